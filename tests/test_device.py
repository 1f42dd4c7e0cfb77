"""The machine a run is on.

pytest tests/test_device.py
"""

import os

import device


def test_torch_is_told_to_use_huge_pages_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    device.pick("cpu")
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    device.pick("cpu")
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
