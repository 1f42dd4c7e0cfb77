"""The machine a run is on: which device, which number format, how full it is."""

import os
import resource
import sys

import torch

from inheritune.base.errors import UserError


def pick(name: str, local_rank: int = 0) -> torch.device:
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
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is not supported: use auto, cpu, cuda or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps asked for, but torch finds no Apple GPU; use --device cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name} asked for, but torch sees no CUDA GPU; use --device cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)  # needs a GPU
        if device.index >= torch.cuda.device_count():  # needs a GPU
            raise UserError(f"{device} asked for, but there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)  # needs a GPU
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype that autocast uses; float32 means no autocast. GPUs before Ampere only emulate bfloat16
    (slower than float32): float16 there."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def peak_memory_mb(device: torch.device) -> float:
    """The most memory (MB) this process has held so far: on the GPU if it uses one, else resident in RAM."""
    if device.type == "cuda":  # needs a GPU
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
