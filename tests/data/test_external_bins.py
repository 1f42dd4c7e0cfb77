"""Bins of others: read for what they are, or refused by name."""

import os
import shutil

import numpy as np
import pytest

from inheritune.base.errors import UserError
from inheritune.data.reader import Tokens, identity, read_meta
from tests.tiny import write_data

IDS = np.random.default_rng(0).integers(0, 50257, 5000).astype("<u2")


def write_llmc(path, ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.tobytes())


def read_all(folder, split):
    tokens = Tokens(str(folder), split)
    return tokens.read(0, len(tokens))


def test_shards_of_llmc_and_modded_nanogpt(tmp_path):
    """Without their headers, in order, *_val_* for validation."""
    for i in (2, 1):
        write_llmc(tmp_path / f"fineweb_train_{i:06d}.bin", IDS[(i - 1) * 1000 : i * 1000])
    write_llmc(tmp_path / "fineweb_val_000000.bin", IDS[4000:])
    (tmp_path / "._fineweb_train_000001.bin").write_bytes(b"a Mac's second file" * 9)
    assert (read_all(tmp_path, "train") == IDS[:2000]).all()
    assert (read_all(tmp_path, "val") == IDS[4000:]).all()
    assert read_meta(str(tmp_path))["tokenizer"]["name"] == "gpt2"


@pytest.mark.parametrize("wrong", [{"count": 99}, {"version": 2}, {"magic": 20240801}])
def test_a_wrong_header_is_refused(tmp_path, wrong):
    write_llmc(tmp_path / "a_train_1.bin", IDS, **wrong)
    with pytest.raises(UserError, match=r"is llm.c's .*, but not a whole file of GPT-2 ids"):
        Tokens(str(tmp_path), "train")


def test_datatroves_ds_by_the_metadata_beside_them(tmp_path):
    for name, dtype, size in (("000_00000.ds", "<u2", 2), ("000_val.ds", "<u4", 4)):
        (tmp_path / name).write_bytes(IDS.astype(dtype).tobytes())
        (tmp_path / f"{name}.metadata").write_text(f"openai-community/gpt2|{size}\n5000\n5K")
        (tmp_path / f"{name}.index").write_bytes(bytes(8))
    assert (read_all(tmp_path, "train") == IDS).all() and (read_all(tmp_path, "val") == IDS).all()
    (tmp_path / "000_00000.ds.metadata").write_text("meta-llama/Llama-3.2-1B|4\n2500")
    with pytest.raises(UserError, match=r"made with meta-llama/Llama-3.2-1B, not with gpt2: write a meta"):
        Tokens(str(tmp_path), "train")
    os.unlink(tmp_path / "000_00000.ds.metadata")
    with pytest.raises(UserError, match="was made with an unknown tokenizer"):
        Tokens(str(tmp_path), "train")


def test_megatrons_and_ids_of_more_bits_without_a_meta_are_refused(tmp_path):
    (tmp_path / "train.bin").write_bytes(IDS.astype("<u4").tobytes())
    with pytest.raises(UserError, match=r"every second id of 16 bits is 0, .* write a meta.json"):
        Tokens(str(tmp_path), "train")
    meta = '{"dtype": "uint32", "tokenizer": {"name": "gpt2", "n_vocab": 50257, "eot": 50256}}'
    (tmp_path / "meta.json").write_text(meta)
    assert (read_all(tmp_path, "train") == IDS).all()
    os.rename(tmp_path / "meta.json", tmp_path / "train.idx")
    with pytest.raises(UserError, match=r"train.bin is Megatron's"):
        Tokens(str(tmp_path), "train")


def test_tokens_without_a_meta_are_told_apart_by_what_they_are_and_not_by_where(tmp_path):
    before = identity(write_data(tmp_path / "a", meta=False))
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert identity(str(tmp_path / "b")) == before
    assert identity(write_data(tmp_path / "a", meta=False, high=50)) != before  # of the same size
