"""The order of the data and the files it comes from."""

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inheritune.base.errors import UserError
from inheritune.data import reader as data_module
from inheritune.data.reader import ROUNDS, Tokens, TrainData, ValData, check_tokenizer, feistel, order
from inheritune.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from tests.data.test_tokenizer import save
from tests.tiny import TOKENIZER, tiny_config, write_data

keys = st.lists(st.integers(0, 2**64 - 1), min_size=ROUNDS, max_size=ROUNDS).map(
    lambda k: np.array(k, dtype=np.uint64)
)
edges = st.sampled_from([n for b in range(1, 13) for n in (2**b - 1, 2**b, 2**b + 1)] + [1, 2, 3])


@given(st.sampled_from([10**12, 2**40, 2**40 + 1, 2**62]), keys, st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_feistel_is_one_to_one_on_huge_ranges_without_memory(n, key, seed):
    i = np.unique(np.concatenate((np.random.default_rng(seed).integers(0, n, 5000), [0, 1, n - 2, n - 1])))
    out = feistel(i, n, key)
    assert len(np.unique(out)) == len(i) and out.min() >= 0 and out.max() < n
    for one in (0, len(i) // 2, -1):  # each number's place is its own affair
        assert feistel(i[[one]], n, key)[0] == out[one]


@given(edges | st.integers(1, 5000), st.integers(0, 2**63 - 1), st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_every_epoch_holds_each_window_once(n, seed, epochs):
    windows = order(np.arange(n * epochs), n, seed).reshape(epochs, n)
    assert (np.sort(windows, axis=1) == np.arange(n)).all()
    shuffled = np.random.default_rng(0).permutation(n * epochs)
    assert (order(shuffled, n, seed) == windows.flatten()[shuffled]).all()


def test_the_order_is_what_it_always_was():
    """A checkpoint of an older version must go on with the batches that it would have had."""
    assert order(range(8), 1000, 1337).tolist() == [102, 507, 453, 605, 514, 24, 188, 682]
    assert order(range(998, 1004), 1000, 1337).tolist() == [3, 593, 213, 905, 840, 744]
    assert order(range(3), 10**12, 7).tolist() == [323387883808, 341249204222, 351981874168]
    assert order(range(15, 21), 17, 2).tolist() == [8, 10, 8, 12, 10, 7]
    assert order(range(3), 1, 0).tolist() == [0, 0, 0]


def stream(folder, split="train", dtype="<u2"):
    return np.fromfile(f"{folder}/{split}.bin", dtype=dtype).astype(np.int64)


def test_an_epoch_trains_on_every_token_once(tmp_path):
    ids = stream(write_data(tmp_path / "d", train=1003))
    data = TrainData(tmp_path / "d", 8, seed=3)
    assert data.n_windows == 125
    windows = data.batch(0, 125)
    assert windows.dtype == torch.int32 and windows.shape == (125, 9)
    for window, start in zip(windows, order(np.arange(125), 125, 3), strict=True):
        assert (window.numpy() == ids[start * 8 : start * 8 + 9]).all()


def test_the_global_batches_are_the_same_for_any_number_of_ranks(tmp_path):
    write_data(tmp_path / "d")
    data = TrainData(tmp_path / "d", 8, seed=3)
    for first in (0, 12, 12 * 31):  # the last runs over the end of an epoch of 374 windows
        whole = data.batch(first, 12)
        for world in (2, 3, 4):
            dealt = torch.empty_like(whole)
            for rank in range(world):
                dealt[rank::world] = data.batch(first, 12, rank, world)
            assert torch.equal(dealt, whole)


def test_parts_of_the_stream_share_no_window(tmp_path):
    # every id is its own position
    np.arange(4001, dtype="<u2").tofile(tmp_path / "train.bin")
    parts = [TrainData(tmp_path, 8, 0, start, end) for start, end in ((0, 0.3), (0.3, 0.55), (0.55, 1))]
    seen = [p.batch(0, p.n_windows)[:, :-1].flatten().numpy() for p in parts]
    assert [s.min() for s in seen] == [0, 1200, 2200]
    together = np.concatenate(seen)
    assert len(np.unique(together)) == len(together) >= 4001 - 3 * 9
    targets = [p.batch(0, p.n_windows)[:, 1:].max().item() for p in parts]
    assert targets[0] < 1200 and targets[1] < 2200, "not even as a target"


def write_shards(folder, ids, cuts, dtype="<u2", split="train"):
    folder.mkdir(exist_ok=True)
    shards = []
    for i, part in enumerate(np.split(ids, cuts)):
        part.astype(dtype).tofile(folder / f"{split}_{i:06d}.bin")
        shards.append({"file": f"{split}_{i:06d}.bin", "tokens": len(part)})
    return shards


@given(st.lists(st.integers(0, 200), max_size=6), st.integers(0, 180), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_shards_are_one_stream(tmp_path_factory, cuts, start, count):
    folder = tmp_path_factory.mktemp("shards")
    ids = np.random.default_rng(0).integers(0, 50257, 200)
    shards = write_shards(folder, ids, sorted(cuts))
    meta = {"tokenizer": {"name": "gpt2", "n_vocab": 50257, "eot": 50256}, "dtype": "uint16"}
    # by their names alone, and as meta.json lists them
    for splits in ({}, {"splits": {"train": {"shards": shards}}}):
        (folder / "meta.json").write_text(json.dumps(meta | splits))
        tokens = Tokens(folder, "train")
        assert len(tokens) == 200
        assert (tokens.read(start, count) == ids[start : start + count]).all()


def test_a_bin_that_is_cut_off_while_it_is_read_is_one_line(tmp_path):
    """(Memory maps would end the process with SIGBUS.)"""
    data = TrainData(write_data(tmp_path / "d"), 8, 0)
    data.batch(0, data.n_windows)
    os.truncate(tmp_path / "d/train.bin", 2 * 100 + 1)
    with pytest.raises(UserError, match=r"train.bin ends before token \d+: it has just been cut off"):
        data.batch(0, data.n_windows)


def test_batches_are_those_of_every_step_and_the_next_one_is_read_meanwhile(tmp_path, monkeypatch):
    data = TrainData(write_data(tmp_path / "d"), 8, 0)
    asked, read = [], data.batch

    def batch(*where):
        asked.append(where)
        return read(*where)

    monkeypatch.setattr(data, "batch", batch)
    batches = data.batches(3, 6, rank=1, world=2)
    for step in (3, 4, 5):
        assert torch.equal(next(batches), read(step * 6, 6, 1, 2))
        assert (step * 6, 6, 1, 2) in asked
    batches.close()
    assert asked == [(step * 6, 6, 1, 2) for step in (3, 4, 5, 6)]


def test_thousands_of_shards_are_not_all_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "MAX_OPEN", 3)
    ids = np.arange(40)
    write_shards(tmp_path / "d", ids, range(2, 40, 2))
    tokens = Tokens(tmp_path / "d", "train")

    def opened():
        links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return sum(os.path.exists(link) and os.readlink(link).startswith(str(tmp_path)) for link in links)

    for _ in range(2):
        assert (tokens.read(0, 40) == ids).all() and opened() == 3


def test_windows_begin_with_the_token_that_texts_begin_with(tmp_path):
    """The targets are those of the stream, and so is the rest of the inputs."""
    folder = write_data(tmp_path / "data", tokenizer=TOKENIZER | {"bos": 200})
    windows, stream = Tokens(folder, "val").windows([0, 3], 8), Tokens(folder, "val").read(0, 40)
    assert windows[:, 0].tolist() == [200, 200]
    assert windows[:, 1:].tolist() == [stream[1:9].tolist(), stream[25:33].tolist()]


def shard(**changes):
    return {"splits": {"train": {"shards": [{"file": "train.bin", "tokens": 100} | changes]}}}


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"dtype": ">u2"},
        {"tokenizer": "gpt2"},
        {"tokenizer": TOKENIZER | {"n_vocab": 10**12}},
        {"tokenizer": TOKENIZER | {"eot": 257}},
        {"tokenizer": TOKENIZER | {"name": 3}},
        {"splits": {"train": {"shards": {"file": "train.bin"}}}},
        {"splits": {"train": {"shards": ["train.bin"]}}},
        {"splits": {"val": {"shards": []}}},
        shard(file="/etc/passwd"),
        shard(file="gone.bin"),
        shard(tokens="9"),
        shard(tokens=10**30),
    ],
    ids=str,
)
def test_a_damaged_meta_is_one_line(tmp_path, meta):
    write_data(tmp_path / "d", train=100)
    good = json.loads((tmp_path / "d/meta.json").read_text())
    (tmp_path / "d/meta.json").write_text(json.dumps(good | meta if meta else {}))
    with pytest.raises(UserError, match=r"prepare the data again") as e:
        Tokens(tmp_path / "d", "train")
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("eval_tokens, used", [(10**9, 399), (100, 100), (8, 8), (15, 8)])
@pytest.mark.parametrize("group", [1, 3, 100])
def test_validation_is_the_first_tokens_in_order(tmp_path, eval_tokens, used, group):
    ids = stream(write_data(tmp_path / "d"), "val")
    val = ValData(tmp_path / "d", 8, eval_tokens, group)
    windows = torch.cat([val.batch(g) for g in range(val.n_groups)]).numpy()
    assert val.n_windows == len(windows) == used // 8
    assert val.n_groups == math.ceil(val.n_windows / group)
    assert (windows[:, :-1].flatten() == ids[: len(windows) * 8]).all()
    assert (windows[:, 1:].flatten() == ids[1 : len(windows) * 8 + 1]).all()


def test_an_empty_split_has_no_tokens(tmp_path):
    write_data(tmp_path / "d", train=0)
    assert len(Tokens(str(tmp_path / "d"), "train")) == 0


def test_data_and_model_must_have_the_same_tokenizer(tmp_path):
    data = write_data(tmp_path / "d")
    config = tiny_config()
    check_tokenizer(data, str(tmp_path), config)
    check_tokenizer(data, str(tmp_path), tiny_config(tokenizer=""))
    check_tokenizer(data, str(tmp_path), tiny_config(n_vocab=256, eot=255))  # there are rows for all ids
    with pytest.raises(UserError, match="was tokenised with 'bytes'"):
        check_tokenizer(data, str(tmp_path), tiny_config(tokenizer="gpt2"))
    with pytest.raises(UserError, match=r"has 257 ids, .* only 256"):
        check_tokenizer(data, str(tmp_path), tiny_config(vocab_size=256, n_vocab=256, eot=255))


def test_data_and_model_must_have_the_same_tokenizer_json(tmp_path):
    for name in ("bpe", "unigram"):
        save(tmp_path / name, name)
    model = str(tmp_path / "bpe")
    config = tiny_config(tokenizer=TOKENIZER_FILE, n_vocab=300, vocab_size=900)
    own = load_tokenizer(model).describe()
    check_tokenizer(write_data(tmp_path / "a", tokenizer=own), model, config)
    for entry in (load_tokenizer(str(tmp_path / "unigram")).describe(), own | {"sha256": "0"}):
        other = write_data(tmp_path / "b", tokenizer=entry)
        with pytest.raises(UserError, match=r"was tokenised with (another )?'?tokenizer.json"):
            check_tokenizer(other, model, config)
    with pytest.raises(UserError, match=r"was tokenised with 'bytes' .* trained with 'tokenizer.json'"):
        check_tokenizer(write_data(tmp_path / "c"), model, config)
