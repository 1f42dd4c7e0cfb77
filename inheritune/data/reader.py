"""Token bins as one long stream, cut into windows whose training order is a pure function of (seed,
position).

A data folder holds `{train,val}.bin` or `train_000000.bin …`, raw little-endian token ids, and `meta.json`,
which says what they are. The bins of others, without meta.json, are read as GPT-2's ids (external_bins.py).

Window i is the block_size + 1 tokens from i × block_size on: inputs, and targets one further. Within an epoch
every window comes exactly once, in an order that a keyed permutation computes window by window: there is no
list of indices, no generator state, and the position in the data is one integer however many ranks there are.
"""

import functools
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from inheritune.base.errors import UserError
from inheritune.base.files import read_json
from inheritune.data.external_bins import Bin, external_bins
from inheritune.data.tokenizer import TOKENIZER_FILE, load_tokenizer

GPT2 = {"name": "gpt2", "n_vocab": 50257, "eot": 50256}
MAX_VOCAB = 2**26  # beyond it, meta.json is damaged
MAX_OPEN = 64  # shards that are open at a time; a Mac allows a process 256 files
ROUNDS = 4  # of the Feistel network; tests/data/test_reader.py finds no pattern in its orders


# frozen: data order (feistel, mix, order, and which tokens window i is: Tokens.windows)


def feistel(i: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """The numbers at places i (int64, 0 ≤ i < n) of the permutation of range(n) that `key` chooses.

    A balanced Feistel network permutes [0, 4^b), the smallest such range that holds n; numbers that land
    outside [0, n) are sent through again until they land inside (cycle walking), which keeps it a
    permutation. `key` is ROUNDS uint64. Needs no memory beyond the numbers asked for; n may be as large as
    2^62.
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)  # bits in each half
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    x = np.asarray(i).astype(np.uint64)
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        left, right = x[outside] >> shift, x[outside] & mask
        for k in key:
            left, right = right, left ^ (mix(right ^ k) & mask)
        x[outside] = left << shift | right
        outside = x >= np.uint64(n)
    return x.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64s so that every input bit changes every output bit (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def order(samples: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The window numbers (int64) of global samples (int64, counted from 0 over all epochs of n samples). Each
    epoch is its own permutation of range(n)."""
    samples = np.asarray(samples, dtype=np.int64)
    windows = np.empty_like(samples)
    for epoch in np.unique(samples // n):
        here = samples // n == epoch
        digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
        windows[here] = feistel(samples[here] % n, n, np.frombuffer(digest, dtype="<u8")[:ROUNDS])
    return windows


class TrainData:
    """The training windows of a run, dealt to ranks. `start` and `end` are fractions of the stream: a run can
    use a part that another did not see."""

    def __init__(self, folder: str, block_size: int, seed: int, start: float = 0.0, end: float = 1.0):
        self.tokens = Tokens(folder, "train")
        self.block_size, self.seed = block_size, seed
        self.first = int(len(self.tokens) * start)
        last = int(len(self.tokens) * end)
        self.n_windows = (last - self.first - 1) // block_size
        if self.n_windows < 1:
            what = f"tokens {self.first:,} to {last:,} of train hold no window"
            cure = "use a smaller block_size or more data"
            raise UserError(f"{folder}: {what} of block_size + 1 = {block_size + 1}: {cure}")

    def batch(self, first_sample: int, count: int, rank: int = 0, world: int = 1) -> torch.Tensor:
        """Windows (count/world, block_size + 1) int32: rank 1 of 4 gets samples 1, 5, 9, … of `count`."""
        samples = first_sample + np.arange(rank, count, world)
        return self.tokens.windows(order(samples, self.n_windows, self.seed), self.block_size, self.first)

    def batches(self, step: int, count: int, rank: int = 0, world: int = 1) -> Iterator[torch.Tensor]:
        """Yield `batch` for every step from `step` on; a thread reads the next step's meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self.batch, step * count, count, rank, world)
            while True:
                batch, step = ahead.result(), step + 1
                ahead = reader.submit(self.batch, step * count, count, rank, world)
                yield batch


class ValData:
    """The first `eval_tokens` ids of a split in whole windows, in order, `group` windows at a time. None: all
    ids; a shorter last window is a group of its own. A group does not depend on the number of ranks, and so
    the loss does not."""

    def __init__(self, folder: str, block_size: int, eval_tokens: int | None, group: int, split: str = "val"):
        self.tokens = Tokens(folder, split)
        self.block_size, self.group, n = block_size, group, len(self.tokens)
        self.n_windows, self.rest = divmod(min(n - 1, eval_tokens or n), block_size)
        if eval_tokens is None and n < 2:
            raise UserError(f"{folder}: {split} has {n} tokens; a loss needs two")
        if eval_tokens is not None:
            self.rest = 0
            if self.n_windows < 1:
                what = f"{split} has {n:,} tokens, eval_tokens is {eval_tokens:,}"
                raise UserError(f"{folder}: {what}: both must reach block_size + 1 = {block_size + 1}")
        self.n_groups = -(-self.n_windows // group) + (self.rest > 0)
        self.n_targets = self.n_windows * block_size + self.rest

    def batch(self, g: int) -> torch.Tensor:
        """Windows (≤ group, block_size + 1) int32 of group g, or (1, rest + 1) of the last one."""
        numbers = range(g * self.group, min((g + 1) * self.group, self.n_windows))
        if numbers:
            return self.tokens.windows(numbers, self.block_size)
        return self.tokens.windows([0], self.rest, first=self.n_windows * self.block_size)


class OpenFile(io.FileIO):
    """A file that closes itself, without a warning, when nothing uses it any more."""

    def __del__(self):
        self.close()


class Tokens:
    """One split of a data folder as a read-only stream of `len(tokens)` ids, by plain reads. A memory map
    fills memory with what was read, and kills the process when a bin is cut off meanwhile."""

    def __init__(self, folder: str, split: str):
        meta = read_meta(folder)
        self.folder, self.split, self.tokenizer = folder, split, meta["tokenizer"]
        self.bins = bins_of(folder, split, meta)
        self.ends = np.cumsum([bin.tokens for bin in self.bins], dtype=np.int64)
        self.open_bin = functools.lru_cache(MAX_OPEN)(OpenFile)
        if meta["dtype"] is None and split == "val" and len(self):  # nobody has said whose ids these are
            highest = int(self.read(0, min(len(self), 1 << 20)).max())
            if highest < 0.9 * self.tokenizer["n_vocab"]:
                warn_of_vocabulary(folder, highest)

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start` on, int64; they may lie in several shards."""
        out = np.empty(count, dtype=np.int64)
        shard = int(np.searchsorted(self.ends, start, side="right"))
        filled = 0
        while filled < count:
            bin = self.bins[shard]
            begin = start + filled - (int(self.ends[shard - 1]) if shard else 0)
            here = min(count - filled, int(self.ends[shard]) - start - filled)
            size = here * bin.dtype.itemsize
            file = self.open_bin(bin.path)
            piece = os.pread(file.fileno(), size, bin.start + begin * bin.dtype.itemsize)
            if len(piece) != size:
                raise UserError(f"{bin.path} ends before token {begin + here:,}: it has just been cut off")
            out[filled : filled + here] = np.frombuffer(piece, bin.dtype)
            filled += here
            shard += 1
        return out

    def windows(self, numbers, block_size: int, first: int = 0) -> torch.Tensor:
        """The windows with these numbers, (B, block_size + 1) int32; window 0 begins at token `first`.

        If the tokenizer has a `bos`, it replaces the first token of each window: models trained with it, such
        as Gemma, predict badly without. Raises UserError for an id above the tokenizer's: the wrong tokenizer
        or a damaged bin.
        """
        out = np.stack([self.read(first + int(i) * block_size, block_size + 1) for i in numbers])
        if out.max() >= self.tokenizer["n_vocab"]:
            what = "above the {n_vocab} ids of its tokenizer {name!r}".format(**self.tokenizer)
            cause = "the bin is damaged or its meta.json is another's"
            raise UserError(f"{self.folder}: {self.split} holds id {out.max()}, {what}: {cause}")
        out[:, 0] = self.tokenizer.get("bos", out[:, 0])
        return torch.from_numpy(out.astype(np.int32))


def read_meta(folder: str) -> dict:
    """meta.json of a data folder, or what a nanoGPT folder without one implies. Raises UserError."""
    if not os.path.isdir(folder):
        cure = "prepare it first (prepare.py, prepare_owt.py, prepare_fineweb.py)"
        raise UserError(f"no data folder {folder!r}: {cure}")
    path = os.path.join(folder, "meta.json")
    if not os.path.exists(path):
        if os.path.exists(os.path.join(folder, "progress.json")):
            raise UserError(f"{folder} is unfinished: run its preparation to the end")
        if os.path.exists(os.path.join(folder, "meta.pkl")):
            cure = "python prepare.py input.txt --tokenizer bytes --out data/input"
            what = "a vocabulary of its own in meta.pkl, a pickle, which is not opened"
            raise UserError(f"{folder} has {what}: prepare its text again, for example: {cure}")
        return {"tokenizer": GPT2, "dtype": None}
    meta = read_json(path)
    try:
        tokenizer = meta["tokenizer"]
        shards = [shard for split in meta.get("splits", {}).values() for shard in split["shards"]]
        usable = (
            meta["dtype"] in ("uint16", "uint32")
            and isinstance(tokenizer["name"], str)
            and all(type(tokenizer[key]) is int for key in {"n_vocab", "eot", "bos"} & {*tokenizer})
            and 0 <= tokenizer["eot"] < tokenizer["n_vocab"] <= MAX_VOCAB
            and 0 <= tokenizer.get("bos", 0) < tokenizer["n_vocab"]
            and all(os.path.basename(s["file"]) == s["file"] and type(s["tokens"]) is int for s in shards)
        )
    except (KeyError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise UserError(f"{path} lacks a usable dtype, tokenizer or list of shards; prepare the data again")
    return meta


def identity(folder: str) -> str:
    """A hash of a data folder's tokens, wherever it lies: from meta.json's list of shards, or without one
    from sizes and 64 samples."""
    meta = read_meta(folder)
    if splits := meta.get("splits"):
        return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()
    digest = hashlib.sha256()
    for split in ("train", "val"):
        tokens = Tokens(folder, split)
        digest.update(f"{split} {len(tokens)} ".encode())
        for start in np.linspace(0, max(0, len(tokens) - 4096), 64, dtype=int).tolist():
            digest.update(tokens.read(start, min(4096, len(tokens))).tobytes())
    return digest.hexdigest()


def bins_of(folder: str, split: str, meta: dict) -> list[Bin]:
    """The bins of a split, in order. Raises UserError when a file is missing or contradicts meta.json."""
    if "splits" not in meta:
        return external_bins(folder, split, meta["dtype"])
    if split not in meta["splits"]:
        raise UserError(f"{folder}/meta.json has no {split} split; prepare the data again")
    bins, dtype = [], np.dtype(meta["dtype"]).newbyteorder("<")
    for shard in meta["splits"][split]["shards"]:
        path, count = os.path.join(folder, shard["file"]), shard["tokens"]
        if not os.path.isfile(path):
            raise UserError(f"{path} is missing or not a regular file; prepare the data again")
        if (size := os.path.getsize(path)) != count * dtype.itemsize:
            what = f"has {size:,} bytes, but meta.json says {count:,} tokens of {dtype.itemsize} bytes"
            raise UserError(f"{path} {what}: it was cut off or replaced; prepare the data again")
        bins.append(Bin(path, count, dtype))
    return bins


@functools.cache  # once a process
def warn_of_vocabulary(folder: str, highest: int) -> None:
    what = f"{folder} has no meta.json and is read as GPT-2's 50,257 ids, but the highest in val is {highest}"
    print(f"warning: {what}: was another vocabulary used?", file=sys.stderr)


def check_tokenizer(data: str, model_folder: str, config) -> None:
    """Raise UserError unless the data folder's tokenizer is that of the model in `model_folder`. The model's
    `config` may have a larger vocab_size than the tokenizer has ids: padded, or enlarged by others."""
    of_data = read_meta(data)["tokenizer"]
    of_model = {"name": config.tokenizer, "n_vocab": config.n_vocab}
    if config.tokenizer == TOKENIZER_FILE:
        of_model = load_tokenizer(TOKENIZER_FILE, model_folder).describe()  # {name, n_vocab, eot, sha256}
    # of a model that names no tokenizer, only the number of ids is compared
    name = of_model["name"] or of_data["name"]
    if of_data["name"] != name:
        what = f"{data} was tokenised with {of_data['name']!r} ({of_data['n_vocab']} ids)"
        trained = f"{model_folder} was trained with {name!r} ({of_model['n_vocab']} ids)"
        raise UserError(f"{what}, but {trained}: prepare the data with that one")
    if of_data["n_vocab"] > config.vocab_size:
        raise UserError(f"{data} has {of_data['n_vocab']} ids, {model_folder} only {config.vocab_size}")
    if of_model["name"] and of_data.get("sha256") != of_model.get("sha256"):
        what = f"another {TOKENIZER_FILE} than the one in {model_folder}"
        raise UserError(f"{data} was tokenised with {what}")
