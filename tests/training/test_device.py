"""The machine a run is on.

pytest tests/training/test_device.py
"""

import ast
import glob
import os

import pytest
import torch

from inheritune.training import device
from tests.tiny import ROOT


def test_torch_is_told_to_use_huge_pages_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    device.pick("cpu")
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    device.pick("cpu")
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


@pytest.mark.parametrize(
    "kind, native, dtype",
    [("cuda", True, torch.bfloat16), ("cuda", False, torch.float16), ("cpu", True, torch.float32)],
)
def test_bfloat16_only_where_the_gpu_has_it(monkeypatch, kind, native, dtype):
    """A T4 and a V100 say that they support it, and emulate it."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )
    assert device.pick_dtype("auto", torch.device(kind)) == dtype
    assert device.pick_dtype("bfloat16", torch.device(kind)) == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "card"),
    [
        *(("NVIDIA A10", "A10"), ("NVIDIA A10G", "A10G"), ("NVIDIA A100-SXM4-40GB", "A100 40GB")),
        *(("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("NVIDIA A100 80GB PCIe", "A100 80GB")),
        *(("NVIDIA A100-PCIE-40GB", "A100 40GB"), ("NVIDIA H100 80GB HBM3", "H100")),
        *(("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"), ("NVIDIA H200", "H200")),
        *(("NVIDIA GH200 480GB", "GH200"), ("NVIDIA B200", "B200"), ("NVIDIA B300 SXM6 AC", "B300")),
        *(("NVIDIA L4", "L4"), ("NVIDIA L40", "L40"), ("NVIDIA L40S", "L40S"), ("NVIDIA A40", "A40")),
        *(("NVIDIA RTX A6000", "RTX A6000"), ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada")),
        *(("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA GeForce RTX 5090", "RTX 5090")),
        *(("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None)),
        *(("Tesla V100-SXM2-32GB", "V100"), ("Tesla T4", "T4"), ("NVIDIA T400", None)),
        *(("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA A800-SXM4-80GB", None)),
    ],
)
def test_cards_are_told_apart_by_whole_words(name, card):
    assert device.find_card(name) == card


def test_every_card_is_found_by_its_own_name():
    assert [device.find_card(f"NVIDIA {card}") for card in device.PEAKS] == list(device.PEAKS)


def test_no_float64_is_made_on_a_device():
    """Apple GPUs have none: `.double()` comes behind `.cpu()`, or on what torch.zeros and torch.rand make
    there."""
    for path in [*glob.glob(os.path.join(ROOT, "*.py")), *glob.glob(os.path.join(ROOT, "inheritune/*/*.py"))]:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
        for call in (
            n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
        ):
            where = f"{os.path.basename(path)}:{call.lineno}"
            if call.func.attr == "double":
                made = call.func.value
                name = (
                    made.func.attr
                    if isinstance(made, ast.Call) and isinstance(made.func, ast.Attribute)
                    else ""
                )
                on_cpu = name == "cpu" or (
                    name in ("zeros", "rand") and not any(k.arg == "device" for k in made.keywords)
                )
                assert on_cpu or where.startswith("initialisations.py"), (
                    f"{where}: .double() of what may be on a device"
                )
            for keyword in call.keywords:
                if keyword.arg == "dtype" and ast.unparse(keyword.value).endswith("float64"):
                    assert not any(k.arg == "device" for k in call.keywords), f"{where}: float64 on a device"
