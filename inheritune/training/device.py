"""The machine a run is on: which device, which number format, how fast it could be, how full it is."""

import contextlib
import os
import resource
import sys

import torch

from inheritune.base.errors import UserError


def pick(name, local_rank=0):
    """The torch.device for the setting `device`. Raises UserError when it is not there.

    On Linux, torch is told to put large CPU tensors on huge pages, which makes training steps there some 5 %
    shorter; it must be told before it makes the first one.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device: use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name} asked for, but torch sees no CUDA GPU; use --device cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)  # needs a GPU
        if device.index >= torch.cuda.device_count():  # needs a GPU
            raise UserError(f"{device} asked for, but there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)  # needs a GPU
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps asked for, but torch finds no Apple GPU; use --device cpu")
    elif device.type != "cpu":
        raise UserError(f"--device {name} is not supported: use auto, cpu, cuda or mps")
    return device


def pick_dtype(name, device):
    """The torch dtype that autocast uses; float32 means no autocast."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, name)


def compiles(compile: bool | None, device: torch.device) -> bool:
    """Whether the setting `compile` asks for torch.compile on this device: by default on CUDA only."""
    return device.type == "cuda" if compile is None else compile


def autocast(device, dtype):
    """A context manager for the forward pass."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def peak_memory_mb(device):
    """The most memory (MB) this process has held so far: on the GPU if it uses one, else resident in RAM."""
    if device.type == "cuda":  # needs a GPU
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def synchronize(device):
    """Wait for the device, before a clock is read."""
    if device.type == "cuda":  # needs a GPU
        torch.cuda.synchronize(device)
    elif device.type == "mps":  # needs a GPU
        torch.mps.synchronize()
