"""The machine a run is on."""

import os

import pytest
import torch

from inheritune.training import device
from tests.tiny import HAS_MATRIX_UNITS


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


def test_a_cpu_with_matrix_units_multiplies_in_bfloat16(monkeypatch):
    cpu, amx = torch.device("cpu"), {"amx_bf16": True}
    for capabilities, dtype, text in (
        (amx, torch.bfloat16, "bfloat16 (this CPU has AMX)"),
        ({"amx_bf16": False}, torch.float32, "float32 (this CPU has no matrix units)"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=capabilities: known, raising=False)
        monkeypatch.setattr(device, "has_matrix_units", HAS_MATRIX_UNITS)
        assert device.pick_dtype("auto", cpu) == dtype and device.dtype_text("auto", cpu) == text
    assert device.dtype_text("float16", cpu) == "float16"


@pytest.mark.parametrize(
    ("name", "card"),
    [
        *(("NVIDIA A10G", "A10G"), ("NVIDIA A10", None), ("NVIDIA A100-SXM4-40GB", "A100 40GB")),
        *(("NVIDIA A100 80GB PCIe", "A100 80GB"), ("NVIDIA H100 80GB HBM3", "H100")),
        *(("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", None), ("NVIDIA H200", "H200")),
        *(("NVIDIA GH200 480GB", "GH200"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S")),
        *(("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090 Laptop GPU", None)),
        *(("Tesla V100-SXM2-32GB", "V100"), ("Tesla T4", "T4"), ("NVIDIA T400", None)),
        *(("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA A800-SXM4-80GB", None)),
    ],
)
def test_cards_are_told_apart_by_whole_words(name, card):
    assert device.find_card(name) == card


def test_every_card_is_found_by_its_own_name():
    assert [device.find_card(f"NVIDIA {card}") for card in device.PEAKS] == list(device.PEAKS)
