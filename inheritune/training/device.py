"""The machine a run is on: which device, which number format, how fast it is and how full."""

import os
import re
import resource
import sys

import torch

from inheritune.base.errors import UserError

DTYPE_CHOICES = ("auto", "float32", "bfloat16", "float16")  # the values of --dtype: see pick_dtype

# Peaks of dense matrix products in bf16 (V100, T4: fp16) with sums in fp32, in TFLOP/s; and memory in GB. The
# numbers are from the makers' data sheets. find_card says which one a device is.
PEAKS = {
    "GB200": (2500, 186),
    "B200": (2250, 180),
    "H200": (989, 141),
    "GH200": (989, 96),
    "H100 PCIe": (756, 80),
    "H100": (989, 80),
    "A100 80GB": (312, 80),
    "A100 40GB": (312, 40),
    "L40S": (362, 48),
    "L4": (121, 24),
    "A10G": (70, 24),
    "RTX 5090": (209, 32),
    "RTX 4090": (165, 24),
    "RTX 3090": (71, 24),
    "V100": (125, 32),
    "T4": (65, 16),
}
# words of a device's name that say nothing of its speed: maker, form factor, memory size
NO_MODEL_NAME = re.compile(
    r"NVIDIA|Tesla|GeForce|Generation|Server|Workstation|Edition|SXM\d*|PCIE?|AC|HBM\d\w*|\d+GB", re.I
)


def pick(name: str, local_rank: int = 0) -> torch.device:
    """The torch.device for the setting `device`. Raises UserError when it is not there.

    Call it before the first tensor is made: on Linux it tells torch to put large CPU tensors on huge pages,
    which makes training steps shorter.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in there:
        raise UserError(f"--device {name!r} is not a device: use auto, cpu, cuda, cuda:1 or mps")
    if not there[device.type]:
        raise UserError(f"--device {name} asked for, but torch sees no such GPU; use --device cpu")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)  # needs a GPU
        if device.index >= torch.cuda.device_count():  # needs a GPU
            raise UserError(f"{device} asked for, but there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)  # needs a GPU
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype that autocast uses; float32 means no autocast.

    auto is bfloat16 where the device multiplies in it. GPUs before Ampere emulate it, which is slower than
    float32: auto is float16 there. A CPU without matrix units, or an Apple GPU, computes in float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.bfloat16 if has_matrix_units() else torch.float32
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which models compute in `dtype`; fp32 is no autocast."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def has_matrix_units() -> bool:
    """Whether the CPU multiplies in bfloat16, as Intel's AMX does. An older torch does not say: False."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)
    return capabilities().get("amx_bf16", False)


def dtype_text(name: str, device: torch.device) -> str:
    """The number format of a run, and why on a CPU: `"auto"` → `"float32 (this CPU has no matrix units)"`."""
    dtype = str(pick_dtype(name, device)).removeprefix("torch.")
    if name != "auto" or device.type != "cpu":
        return dtype
    return f"{dtype} (this CPU has {'AMX' if has_matrix_units() else 'no matrix units'})"


def is_compiled(compile: bool | None, device: torch.device) -> bool:
    """Whether models are compiled under the setting `compile`, of which None means: on CUDA only."""
    return device.type == "cuda" if compile is None else compile


def peak_memory_mb(device: torch.device) -> float:
    """The most memory (MB) this process has held so far: on the GPU if it uses CUDA, else resident in RAM."""
    if device.type == "cuda":  # needs a GPU
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak in FLOP/s of a CUDA device that PEAKS knows, else None: a guess would make MFU a lie."""
    if device.type != "cuda":
        return None
    card = find_card(torch.cuda.get_device_name(device))  # needs a GPU
    return PEAKS[card][0] * 1e12 if card else None  # needs a GPU


def find_card(name: str) -> str | None:
    """The key of PEAKS for a device's name: `"NVIDIA A100-SXM4-40GB"` → `"A100 40GB"`, else None.

    It is the first key contained in the name, all other words being in NO_MODEL_NAME. So an A10 is no A10G,
    and a laptop's RTX 4090 is unknown.
    """
    words = set(re.split(r"[ -]", name))
    for card in PEAKS:
        own = set(card.split())
        if own <= words and all(NO_MODEL_NAME.fullmatch(word) for word in words - own):
            return card
    return None
