"""Tensors in files, a few megabytes at a time: read when asked for, written and hashed piece by piece.

So a model of 6 GB is cut, checked and written in the memory of one piece. Files are in the safetensors format: eight
bytes that say how long the header is, the header in JSON, and the tensors, one behind the other.
"""

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from inheritune.base.errors import UserError

PIECE = 2**22  # bytes; stays in the processor's cache while it is read, checked, hashed and written
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}  # as files have them


class Lazy:
    """A tensor that is read or made row by row: `lazy[a:b]` is the torch.Tensor of rows a to b.

    What takes these takes torch's tensors as well: both have `shape`, `dtype` and `[a:b]`.
    """

    def __init__(self, shape, dtype, rows):
        """rows(a, b) gives rows a to b, (b - a, *shape[1:]) of dtype."""
        self.shape, self.dtype, self.rows = tuple(shape), dtype, rows

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(self.shape[0])
        return self.rows(start, stop)


def pieces(tensor):
    """Yield a tensor of at least one dimension (torch's or Lazy) in runs of rows, of PIECE bytes or one row."""
    step = max(1, PIECE // max(1, math.prod(tensor.shape[1:]) * tensor.dtype.itemsize))
    for start in range(0, tensor.shape[0], step):
        yield tensor[start : start + step]


def raw(tensor):
    """The bytes of a contiguous CPU tensor as an array of uint8 that shares its memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def check_finite(tensor, name, source):
    """The tensor, if all of it is finite; else UserError: the run that wrote it had diverged, or it is damaged."""
    values = tensor.detach()
    values = values.float() if tensor.dtype == torch.bfloat16 else values  # which numpy does not have
    if not np.isfinite(
        values.numpy()
    ).all():  # on one core: torch's would spin on the other while the disk works
        raise UserError(f"{source}: {name:.80} holds NaN or infinity: take an earlier checkpoint")
    return tensor


def read_header(path):
    """{tensor name: (dtype as the file says it, shape, offset in the file)}. Raises UserError for a damaged file."""
    try:
        safe_open(path, framework="pt")  # which checks lengths, shapes and offsets against each other
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            entries = json.loads(f.read(length))
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged ({e}); restore or fetch it again") from None
    entries.pop("__metadata__", None)
    return {
        name: (e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
        for name, e in entries.items()
    }


def stored(file, name, dtype, shape, offset):
    """The Lazy tensor of an entry of `read_header`, of an open file. Reading it raises UserError for what is not
    finite, and for a file that has been cut off meanwhile; both say `name`."""
    dtype = DTYPES[dtype]
    row = math.prod(shape[1:]) * dtype.itemsize

    def rows(start, stop):
        tensor = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        file.seek(offset + start * row)
        if file.readinto(raw(tensor)) != tensor.nbytes:
            raise UserError(
                f"{file.name} ends within {name:.80}: it was whole a moment ago; do not change it meanwhile"
            )
        return check_finite(tensor, name, file.name)

    return Lazy(shape, dtype, rows)


def write_tensors(path, tensors):
    """Write {name: tensor (Lazy, or torch's, contiguous and on the CPU)} to a safetensors file, the same bytes as
    safetensors' own save_file, and fsync it; returns the hex sha256 of the file.

    Raises OSError when the disk is full or the like.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (list(names).index(tensors[name].dtype), name))
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        entries[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    head = len(header).to_bytes(8, "little") + header
    whole = (tensors[name] if tensors[name].shape else tensors[name].reshape(1) for name in order)
    digest = hashlib.sha256()
    with open(path, "wb") as f, ThreadPoolExecutor(1) as beside:
        f.write(head)
        hashed = beside.submit(digest.update, head)
        for piece in (raw(piece) for tensor in whole for piece in pieces(tensor)):
            hashed.result()  # of the piece before: no more than two are in memory
            hashed = beside.submit(digest.update, piece)
            f.write(piece)
            if hasattr(os, "posix_fadvise"):  # Linux begins to write the piece to the disk, not all at fsync
                os.posix_fadvise(f.fileno(), f.tell() - len(piece), len(piece), os.POSIX_FADV_DONTNEED)
        f.flush()
        os.fsync(f.fileno())
    return digest.hexdigest()
