"""Token bins of others, without our list of shards: nanoGPT's, llm.c's and modded-nanogpt's, datatrove's.

Which split a file belongs to, its name says: train.bin, val_000000.bin, fineweb_train_000001.bin. A .ds of
datatrove's is for training unless its name says val.
"""

import os
import re
from typing import NamedTuple

import numpy as np

from inheritune.base.errors import UserError

LLMC_MAGIC, LLAMA3_MAGIC = 20240520, 20240801  # how llm.c's files begin: with a header of 256 int32
HEADER = 1024  # its bytes; after the magic number come the version, 1, and the number of tokens
WRITE_META = 'write a meta.json: {"dtype": "uint32", "tokenizer": {"name": …, "n_vocab": …, "eot": …}}'


class Bin(NamedTuple):
    path: str
    tokens: int
    dtype: np.dtype
    start: int = 0  # the byte at which the tokens begin


def external_bins(folder: str, split: str, dtype: str | None) -> list[Bin]:
    """The files of a split, in the order of their names. `dtype` is what a meta.json says, if there is one.

    Raises UserError where there are none, or one is not what its header, its metadata or its ids say.
    """
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    found = [name for name in names if re.fullmatch(rf"(.*_)?{split}(_\d+)?\.bin", name)]
    if not found and split in ("train", "val"):
        found = [name for name in names if name.endswith(".ds")]
        found = [name for name in found if ("val" in re.split("[^a-z]", name)) == (split == "val")]
    if not found:
        raise UserError(f"{folder} has no {split}.bin and no meta.json: prepare the data first, or again")
    return [examine_bin(os.path.join(folder, name), dtype) for name in found]


def examine_bin(path: str, dtype: str | None) -> Bin:
    """How the tokens lie in a file. Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing or not a regular file; prepare the data again")
    if os.path.exists(path.removesuffix(".bin") + ".idx"):
        raise UserError(f"{path} is Megatron's (.bin and .idx), which is not read: prepare its text again")
    size, begin = os.path.getsize(path), np.fromfile(path, "<u2", 1 << 16)
    magic, version, count = begin[:6].view("<i4").tolist() if len(begin) > 5 else (0, 0, 0)
    if magic in (LLMC_MAGIC, LLAMA3_MAGIC):
        if magic == LLAMA3_MAGIC or version != 1 or size != HEADER + 2 * count:
            said = f"version {version}, {count:,} tokens"
            raise UserError(f"{path} is llm.c's ({said}), but not a whole file of GPT-2 ids; fetch it again")
        return Bin(path, count, np.dtype("<u2"), HEADER)
    given = dtype or (metadata_dtype(path) if path.endswith(".ds") else None)
    found = np.dtype(given or "uint16").newbyteorder("<")
    if size % found.itemsize:
        what = f"has {size:,} bytes, no whole number of tokens of {found.itemsize} bytes"
        raise UserError(f"{path} {what}: it was cut off or replaced; prepare the data again")
    if given is None and len(begin) > 64 and (begin[1::2] == 0).mean() > 0.99:
        raise UserError(f"{path}: every second id of 16 bits is 0, so they have 32 or 64 bits; {WRITE_META}")
    return Bin(path, size // found.itemsize, found)


def metadata_dtype(path: str) -> str:
    """The dtype of a .ds in GPT-2's vocabulary, as the .ds.metadata beside it says: `gpt2|2`."""
    try:
        with open(path + ".metadata", encoding="utf-8") as f:
            name, _, size = f.readline().strip().rpartition("|")
        if os.path.basename(name) == "gpt2":
            return {"2": "uint16", "4": "uint32"}[size]
    except (OSError, ValueError, KeyError):
        name = "an unknown tokenizer"
    raise UserError(f"{path} was made with {name}, not with gpt2: {WRITE_META}")
