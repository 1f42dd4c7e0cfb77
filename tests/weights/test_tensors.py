"""Tensors a few rows at a time: the bytes of safetensors' own writer, however many rows."""

import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import inherit
from inheritune.base.errors import UserError
from inheritune.weights import gpt2_format, tensors
from inheritune.weights.tensors import check_finite, copy_rows, read_tensors, write_tensors
from tests.tiny import gpt2, refusal, tiny_model, write_checkpoint


def some_tensors():
    """All dtypes and unusual shapes; neither names nor sizes alone give the order in the file."""
    torch.manual_seed(0)
    shapes = {"a": (3, 5), "é": (7,), 'b\\"': (), "c": (0, 4), "d": (2, 3, 4), "A": (1,)}
    dtypes = list(enumerate((torch.float16, torch.float64, torch.bfloat16, torch.float32)))
    return {f"{name}{i}": torch.randn(shapes[name]).to(dtype) for i, dtype in dtypes for name in shapes}


@pytest.mark.parametrize("run", [1, 24, 2**22])
def test_the_file_is_what_safetensors_writes(tmp_path, monkeypatch, run):
    monkeypatch.setattr(tensors, "CHUNK", run)
    made = some_tensors()
    save_file(made, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", made)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_stored_is_read_by_rows(tmp_path):
    made = some_tensors()
    save_file(made, tmp_path / "file")
    lazy = read_tensors(tmp_path / "file")
    assert lazy.keys() == made.keys()
    for name, tensor in made.items():
        assert (lazy[name].shape, lazy[name].dtype) == (tensor.shape, tensor.dtype)
        copy = torch.empty(tensor.shape, dtype=torch.float64)
        copy_rows(copy, lazy[name])
        assert torch.equal(copy, tensor.double())
        for rows in (slice(None), slice(1, 2), slice(2), slice(1, 100)):
            assert not tensor.dim() or torch.equal(lazy[name][rows], tensor[rows]), (name, rows)


def test_no_more_than_a_run_of_rows_is_in_memory(tmp_path, monkeypatch):
    gpt2(tiny_model()).save_pretrained(tmp_path / "ref", max_shard_size="20KB")
    command = ["--ckpt", str(tmp_path / "ref"), "--blocks=2,0,0", "--out"]
    inherit.main([*command, str(tmp_path / "whole")])
    sizes, check = [], tensors.check_finite
    monkeypatch.setattr(tensors, "CHUNK", 300)
    monkeypatch.setattr(tensors, "check_finite", lambda t, *a: sizes.append(t.nbytes) or check(t, *a))
    inherit.main([*command, str(tmp_path / "runs")])
    made, whole = (tmp_path / name / "model.safetensors" for name in ("runs", "whole"))
    assert made.read_bytes() == whole.read_bytes()
    assert max(sizes) <= 300
    assert sum(sizes) > os.path.getsize(whole) * 0.8, "nothing came another way"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_is_what_has_no_nan_and_no_infinity(dtype):
    big = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    assert check_finite(big, "x", "f") is big, "their sum is infinite, they are not"
    for row in ([1.0, math.nan, 2.0], [math.inf, -math.inf]):
        with pytest.raises(UserError, match="f: x holds NaN or infinity"):
            check_finite(torch.tensor(row).to(dtype), "x", "f")


def test_a_nan_in_the_last_row_is_found_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK", 64)
    write_checkpoint(tmp_path / "ref")
    path = tmp_path / "ref/model.safetensors"
    state = {name: t.clone() for name, t in load_file(path).items()}
    state["transformer.wte.weight"][-1, -1] = math.nan
    save_file(state, path)
    said = refusal(inherit.main, ["--ckpt", tmp_path / "ref", "--layers=1", "--out", tmp_path / "sub"])
    assert "wte.weight holds NaN" in said and os.listdir(tmp_path) == ["ref"]


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    write_checkpoint(tmp_path / "ref")
    weights = gpt2_format.read_model(str(tmp_path / "ref"))[0]
    os.truncate(tmp_path / "ref/model.safetensors", 5000)
    with pytest.raises(UserError, match=r"ref/model.safetensors ends within transformer.wte.weight"):
        weights["transformer.wte.weight"][:]
