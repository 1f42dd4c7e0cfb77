"""Tensors in safetensors files, read and written a few megabytes at a time: a model of 6 GB is cut, checked
and written in the memory of a few of its rows.

Why not by safetensors' own `safe_open` and `save_file`? `safe_open` maps files into memory, and one that is
cut off while it is read kills the process by SIGBUS; here it is an error with the file's name. `save_file`
needs the whole model in memory, refuses one tensor under two names (the recipe `stack`), and does not name a
full disk.

The format: eight bytes with the length of the header, the header in JSON, the tensors one after the other.
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

from inheritune.base.errors import UserError, first_line

CHUNK = 2**22  # bytes of rows at a time: they stay in the processor's cache while they are read and checked
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# the causal masks that the released GPT-2 files hold among their tensors
MASKS = re.compile(r"\b(attn|attention)\.(bias|masked_bias)$")


class LazyTensor:
    """A tensor whose rows are read or computed when they are asked for: `lazy[a:b]` calls rows(a, b).

    Functions that take a LazyTensor also take a torch.Tensor: both have `shape` and `dtype`, and `[a:b]`
    gives a torch.Tensor. A LazyTensor without dimensions has one row.
    """

    def __init__(self, shape: tuple, dtype: torch.dtype, rows: Callable[[int, int], torch.Tensor]):
        self.shape, self.dtype, self.rows = tuple(shape), dtype, rows

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.shape[0] if self.shape else 1)
        return self.rows(start, stop)


def n_bytes(tensor: torch.Tensor | LazyTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def row_chunks(tensor: torch.Tensor | LazyTensor) -> Iterator[torch.Tensor]:
    """Yield the rows of a tensor, about CHUNK bytes at a time, but at least one row."""
    if not tensor.shape:
        yield tensor[:] if isinstance(tensor, LazyTensor) else tensor.reshape(1)
        return
    step = max(1, CHUNK // max(1, math.prod(tensor.shape[1:]) * tensor.dtype.itemsize))
    for start in range(0, tensor.shape[0], step):
        yield tensor[start : start + step]


def copy_rows(target: torch.Tensor, tensor: torch.Tensor | LazyTensor) -> None:
    """Copy a tensor into `target` of the same shape, which may have another dtype or layout."""
    start, target = 0, target if target.shape else target.view(1)
    for rows in row_chunks(tensor):
        target[start : start + len(rows)].copy_(rows)
        start += len(rows)


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous CPU tensor, as an array of uint8 that shares its memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def check_finite(tensor: torch.Tensor, name: str, source: str) -> torch.Tensor:
    """Returns the tensor. Raises UserError if it holds NaN or infinity: the run that wrote it had diverged,
    or the file is damaged."""
    values = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
    if not np.isfinite(values.numpy()).all():  # numpy, as it leaves the other cores to the thread that writes
        raise UserError(f"{source}: {name:.80} holds NaN or infinity: take an earlier checkpoint")
    return tensor


def read_tensors(path: str) -> dict[str, LazyTensor]:
    """{name: tensor} of a safetensors file, without causal masks. Only the header is read here.

    Raises UserError when the file is damaged. Reading rows raises it when they are not finite or missing.
    """
    try:
        safe_open(path, framework="pt")  # checks that lengths, shapes and offsets agree
        file = open(path, "rb")  # noqa: SIM115  (stays open as long as one of its tensors is in use)
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged ({first_line(e)}); restore or fetch it again") from None
    entries.pop("__metadata__", None)
    entries = {name: entry for name, entry in entries.items() if not MASKS.search(name)}
    return {name: lazy_tensor(file, name, entry, 8 + length) for name, entry in entries.items()}


def lazy_tensor(file, name: str, entry: dict, start: int) -> LazyTensor:
    """The tensor that a header's `entry` describes, in an open file whose tensors begin at byte `start`."""
    # tensors of other types are refused only when they are read: nobody may want them
    shape, dtype = tuple(entry["shape"]), DTYPES.get(entry["dtype"], torch.float32)
    begin, row = start + entry["data_offsets"][0], math.prod(shape[1:]) * dtype.itemsize

    def rows(a, b):
        if entry["dtype"] not in DTYPES:
            wanted = ", ".join(DTYPES)
            raise UserError(f"{file.name}: {name} is of type {entry['dtype']}, not one of {wanted}")
        tensor = torch.empty((b - a, *shape[1:]), dtype=dtype)
        file.seek(begin + a * row)
        if file.readinto(bytes_of(tensor)) != tensor.nbytes:
            raise UserError(f"{file.name} ends within {name:.80}: do not change it while it is read")
        return check_finite(tensor, name, file.name)

    return LazyTensor(shape, dtype, rows)


def write_tensors(path: str, tensors: dict[str, torch.Tensor | LazyTensor]) -> None:
    """Write tensors to a safetensors file and fsync it. The bytes are those of safetensors' own save_file.

    tensors: lazy ones, or torch's that are contiguous and on the CPU. Raises OSError, as of a full disk.
    """
    # header: largest dtype first, then by name
    names = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: (list(names).index(item[1].dtype), item[0]))
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in ordered:
        begin, end = end, end + n_bytes(t)
        entries[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)

    # one thread writes rows while this one reads and checks the next
    def write(rows):
        f.write(rows)
        if hasattr(os, "posix_fadvise"):  # Linux then begins to write to the disk now, not all at the fsync
            os.posix_fadvise(f.fileno(), f.tell() - len(rows), len(rows), os.POSIX_FADV_DONTNEED)

    with open(path, "wb") as f, ThreadPoolExecutor(1) as writer:
        written = writer.submit(f.write, len(header).to_bytes(8, "little") + header)
        for _, tensor in ordered:
            for rows in row_chunks(tensor):
                written.result()  # so that at most two chunks are in memory
                written = writer.submit(write, bytes_of(rows))
        written.result()
        f.flush()
        os.fsync(f.fileno())
