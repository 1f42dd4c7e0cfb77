"""Tensors in safetensors files, read and written a few megabytes at a time.

So a model of 6 GB is cut, checked and written in the memory of one piece. A file holds eight bytes that give
the length of the header, the header in JSON, and the tensors one after the other.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from inheritune.base.errors import UserError

PIECE = 2**22  # bytes; stays in the processor's cache while it is read, checked and written
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# causal masks, which the released GPT-2 files hold as tensors
MASKS = re.compile(r"\b(attn|attention)\.(bias|masked_bias)$")


class Lazy:
    """A tensor that is read or computed row by row: `lazy[a:b]` is rows(a, b), the torch.Tensor of rows a to
    b. Functions that take these take torch tensors as well: both have `shape`, `dtype` and `[a:b]`."""

    def __init__(self, shape: tuple, dtype: torch.dtype, rows: Callable[[int, int], torch.Tensor]):
        self.shape, self.dtype, self.rows = tuple(shape), dtype, rows

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        return self.rows(start, stop)


def pieces(tensor: torch.Tensor | Lazy) -> Iterator[torch.Tensor]:
    """The rows of a tensor of at least one dimension, in runs of PIECE bytes or of one row."""
    step = max(1, PIECE // max(1, math.prod(tensor.shape[1:]) * tensor.dtype.itemsize))
    for start in range(0, tensor.shape[0], step):
        yield tensor[start : start + step]


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous CPU tensor as an array of uint8 that shares its memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def check_finite(tensor: torch.Tensor, name: str, source: str) -> torch.Tensor:
    """The tensor itself. Raises UserError if it holds NaN or infinity: the run that wrote it had diverged, or
    the file is damaged."""
    values = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
    if not np.isfinite(values.numpy()).all():  # numpy uses one core: the other one writes meanwhile
        raise UserError(f"{source}: {name:.80} holds NaN or infinity: take an earlier checkpoint")
    return tensor


def read_tensors(path: str) -> dict[str, Lazy]:
    """The tensors of a safetensors file but causal masks; only the header is read here.

    Raises UserError when the file is damaged, and later for rows that are not finite or have been cut off.
    """
    try:
        safe_open(path, framework="pt")  # checks lengths, shapes and offsets against each other
        file = open(path, "rb")  # noqa: SIM115  (open as long as one of its tensors is in use)
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged ({e}); restore or fetch it again") from None
    entries.pop("__metadata__", None)
    return {name: stored(file, name, e, 8 + length) for name, e in entries.items() if not MASKS.search(name)}


def stored(file, name: str, entry: dict, start: int) -> Lazy:
    """The tensor of a header's `entry` in an open file whose tensors begin at byte `start`."""
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{file.name}: {name} is of type {entry['dtype']}, not one of {', '.join(DTYPES)}")
    shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
    begin, row = start + entry["data_offsets"][0], math.prod(shape[1:]) * dtype.itemsize

    def rows(a, b):
        tensor = torch.empty((b - a, *shape[1:]), dtype=dtype)
        file.seek(begin + a * row)
        if file.readinto(raw(tensor)) != tensor.nbytes:
            raise UserError(f"{file.name} ends within {name:.80}: do not change it while it is read")
        return check_finite(tensor, name, file.name)

    return Lazy(shape, dtype, rows)


def write_tensors(path: str, tensors: dict[str, torch.Tensor | Lazy]) -> None:
    """Write tensors (Lazy, or torch's, contiguous and on the CPU) to a safetensors file and fsync it. The
    bytes are those of safetensors' own save_file. Raises OSError when the disk is full or the like."""
    # header: largest dtype first, then by name
    names = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: (list(names).index(item[1].dtype), item[0]))
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in ordered:
        begin, end = end, end + math.prod(t.shape) * t.dtype.itemsize
        entries[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)

    # one thread writes a piece while this one reads and checks the next
    def write(piece):
        f.write(piece)
        if hasattr(os, "posix_fadvise"):  # Linux starts to write the piece to the disk now, not all at fsync
            os.posix_fadvise(f.fileno(), f.tell() - len(piece), len(piece), os.POSIX_FADV_DONTNEED)

    with open(path, "wb") as f, ThreadPoolExecutor(1) as writer:
        written = writer.submit(f.write, len(header).to_bytes(8, "little") + header)
        for _, tensor in ordered:
            for piece in pieces(tensor if tensor.shape else tensor.reshape(1)):
                written.result()  # at most two pieces in memory
                written = writer.submit(write, raw(piece))
        written.result()
        f.flush()
        os.fsync(f.fileno())
