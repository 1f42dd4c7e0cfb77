"""Token bins as one long stream, cut into windows whose training order is a pure function of (seed, position).

A data folder holds `{train,val}.bin` or `train_000000.bin …`, raw little-endian token ids, and `meta.json`, which
says what they are; a nanoGPT folder without meta.json is read as GPT-2 uint16.

Window i is the block_size + 1 tokens from i × block_size on: inputs, and targets one further. Within an epoch every
window comes exactly once, in an order that a keyed permutation computes window by window: there is no list of
indices, no generator state, and the position in the data is one integer however many ranks there are.
"""

import functools
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from inheritune.base.errors import UserError
from inheritune.base.files import read_json, sha256
from inheritune.data.tokenizer import RANKS_FILE

GPT2 = {"name": "gpt2", "n_vocab": 50257, "eot": 50256}
MAX_VOCAB = 2**26  # beyond it, meta.json is damaged
MAX_OPEN = 256  # shards that are open at a time; most systems allow a process 1,024 files
ROUNDS = 4  # of the Feistel network; four make a permutation that no statistical test on orders tells from random


def feistel(i, n, key):
    """Where window numbers i (array of int64, 0 ≤ i < n) stand after a permutation of range(n) chosen by `key`.

    A balanced Feistel network permutes [0, 4^b), the smallest such range that holds n; numbers that land outside
    [0, n) are sent through again until they land inside (cycle walking), which keeps it a permutation. `key` is an
    array of ROUNDS uint64. Needs no memory beyond the numbers asked for; n may be as large as 2^62.
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


def mix(x):
    """Scramble uint64s so that every input bit moves every output bit (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def order(samples, n, seed):
    """The windows (int64 array) that the global samples (int64 array, counted from 0 over all epochs) are.

    Each epoch of n samples is its own permutation of range(n).
    """
    samples = np.asarray(samples, dtype=np.int64)
    windows = np.empty_like(samples)
    for epoch in np.unique(samples // n):
        here = samples // n == epoch
        digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
        windows[here] = feistel(samples[here] % n, n, np.frombuffer(digest, dtype="<u8")[:ROUNDS])
    return windows


class Tokens:
    """One split of a data folder as a read-only stream of `len(tokens)` ids.

    Plain reads: a map would fill memory with what was read, and a bin that is cut off meanwhile would kill the process.
    Raises UserError when a file is missing, or its size contradicts meta.json.
    """

    def __init__(self, folder, split):
        meta = read_meta(folder)
        self.folder, self.split, self.tokenizer = folder, split, meta["tokenizer"]
        self.dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self.paths, lengths = [], []
        for shard in shards_of(folder, split, meta):
            path = os.path.join(folder, shard["file"])
            size = file_size(path)
            count = shard.get("tokens", size // self.dtype.itemsize)
            if size != count * self.dtype.itemsize:
                said = f"but meta.json says {count:,} tokens" if "tokens" in shard else "no whole number of tokens"
                raise UserError(
                    f"{path} has {size:,} bytes, {said} of {self.dtype.itemsize} bytes: it was cut off or replaced; "
                    "prepare the data again"
                )
            self.paths.append(path)
            lengths.append(count)
        self.ends = np.cumsum(lengths, dtype=np.int64)
        self.open = functools.lru_cache(MAX_OPEN)(functools.partial(open, mode="rb", buffering=0))

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start, count):
        """`count` ids from `start` on, as an int64 array; it may run across shards."""
        out = np.empty(count, dtype=np.int64)
        shard = int(np.searchsorted(self.ends, start, side="right"))
        filled = 0
        while filled < count:
            begin = start + filled - (int(self.ends[shard - 1]) if shard else 0)
            here = min(count - filled, int(self.ends[shard]) - start - filled)
            size = self.dtype.itemsize
            piece = os.pread(self.open(self.paths[shard]).fileno(), here * size, begin * size)
            if len(piece) != here * size:
                raise UserError(f"{self.paths[shard]} ends before token {begin + here:,}: it has just been cut off")
            out[filled : filled + here] = np.frombuffer(piece, dtype=self.dtype)
            filled += here
            shard += 1
        return out

    def windows(self, numbers, block_size, first=0):
        """Inputs and targets, both (B, block_size) int64, of the windows with these numbers; `first` is window 0's
        first token. Raises UserError when an id is above the tokenizer's range: the wrong tokenizer or a damaged bin.
        """
        out = np.stack([self.read(first + int(i) * block_size, block_size + 1) for i in numbers])
        if out.max() >= self.tokenizer["n_vocab"]:
            raise UserError(
                f"{self.folder}: {self.split} holds id {out.max()}, above the {self.tokenizer['n_vocab']} ids of its "
                f"tokenizer {self.tokenizer['name']!r}: the bin is damaged or its meta.json is another's"
            )
        out = torch.from_numpy(out)
        return out[:, :-1], out[:, 1:]


def read_meta(folder):
    """meta.json of a data folder, or what a nanoGPT folder without one implies. Raises UserError."""
    if not os.path.isdir(folder):
        raise UserError(f"no data folder {folder!r}: prepare it first (prepare.py, prepare_owt.py, prepare_fineweb.py)")
    path = os.path.join(folder, "meta.json")
    if not os.path.exists(path):
        if any(re.fullmatch(r"progress\.json|part_\d+_of_\d+", name) for name in os.listdir(folder)):
            raise UserError(f"{folder} is unfinished: run its preparation, or the join of its parts, to the end")
        return {"tokenizer": GPT2, "dtype": "uint16"}
    meta = read_json(path)
    tokenizer = meta.get("tokenizer")
    if (
        meta.get("dtype") not in ("uint16", "uint32")
        or not isinstance(tokenizer, dict)
        or not isinstance(tokenizer.get("name"), str)
        or not all(type(tokenizer.get(k)) is int for k in ("n_vocab", "eot"))
        or not 0 <= tokenizer["eot"] < tokenizer["n_vocab"] <= MAX_VOCAB
        or not isinstance(meta.get("splits", {}), dict)
    ):
        raise UserError(f"{path} lacks a usable dtype, tokenizer or splits; prepare the data again")
    return meta


def check_tokenizer(folder, model_folder, config):
    """Raise UserError unless a data folder's tokenizer is that of the model in model_folder (with this GPTConfig),
    which may have more rows than the tokenizer has ids: padded, or enlarged by others."""
    theirs, ranks = read_meta(folder)["tokenizer"], os.path.join(model_folder, RANKS_FILE)
    named = config.tokenizer or theirs["name"]  # a model that does not say can only be asked how many ids it has
    if theirs["name"] != named:
        raise UserError(
            f"{folder} was tokenised with {theirs['name']!r} ({theirs['n_vocab']} ids), but {model_folder} was trained "
            f"with {config.tokenizer!r} ({config.n_vocab} ids): prepare the data with that one"
        )
    if theirs["n_vocab"] > config.vocab_size:
        raise UserError(f"{folder} has {theirs['n_vocab']} ids, {model_folder} only {config.vocab_size}")
    if named == RANKS_FILE and os.path.exists(ranks) and theirs.get("sha256", digest := sha256(ranks)) != digest:
        raise UserError(f"{folder} was tokenised with another {RANKS_FILE} than the one in {model_folder}")


def shards_of(folder, split, meta):
    """The shards of a split, in order: [{"file": name, "tokens": count}], the counts only where meta.json has them."""
    if "splits" in meta:
        try:
            shards = [{"file": s["file"], "tokens": s["tokens"]} for s in meta["splits"][split]["shards"]]
        except (KeyError, TypeError):
            raise UserError(
                f"{folder}/meta.json has no usable list of {split} shards; prepare the data again"
            ) from None
        for s in shards:
            name, count = s["file"], s["tokens"]
            if not isinstance(name, str) or os.path.basename(name) != name or type(count) is not int or count < 0:
                raise UserError(f"{folder}/meta.json has an unusable shard entry {s!r}; prepare the data again")
        return shards
    names = sorted(n for n in os.listdir(folder) if re.fullmatch(rf"{split}(_\d+)?\.bin", n))
    if not names:
        raise UserError(f"{folder} has no {split}.bin and no meta.json: prepare the data first, or again")
    return [{"file": name} for name in names]


def file_size(path):
    """Bytes of a bin. Raises UserError when it is not a regular file."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing or not a regular file; prepare the data again")
    return os.path.getsize(path)


def verify(folder, split):
    """Raise UserError unless every shard of a split has the sha256 that meta.json says."""
    meta = read_meta(folder)
    for shard in meta["splits"][split]["shards"] if "splits" in meta else [{}]:
        if "sha256" not in shard:
            raise UserError(f"{folder} says no sha256 of its {split} bins to verify them by: prepare it with ours")
        path = os.path.join(folder, shard["file"])
        if sha256(path) != shard["sha256"]:
            raise UserError(f"{path} is not what was prepared (its sha256 differs): restore it, or prepare it again")


class TrainData:
    """The training windows of a run, dealt to ranks.

    `start` and `end` are fractions of the stream, so that a run can use a part that another did not see.
    Raises UserError when the part holds no window.
    """

    def __init__(self, folder, block_size, seed, start=0.0, end=1.0):
        self.tokens = Tokens(folder, "train")
        self.block_size, self.seed = block_size, seed
        self.first = int(len(self.tokens) * start)
        self.n_windows = (int(len(self.tokens) * end) - self.first - 1) // block_size
        if self.n_windows < 1:
            raise UserError(
                f"{folder}: tokens {self.first:,} to {int(len(self.tokens) * end):,} of train hold no window of "
                f"block_size + 1 = {block_size + 1}: use a smaller block_size or more data"
            )

    def batch(self, first_sample, count, rank=0, world=1):
        """Inputs and targets (count/world, block_size) int64: every world-th of `count` global samples, from `rank`."""
        samples = first_sample + np.arange(rank, count, world)
        return self.tokens.windows(order(samples, self.n_windows, self.seed), self.block_size, self.first)

    def batches(self, step, count, rank=0, world=1):
        """Yield `batch` for every step from `step` on; the next step's is read in a thread meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self.batch, step * count, count, rank, world)
            while True:
                batch, step = ahead.result(), step + 1
                ahead = reader.submit(self.batch, step * count, count, rank, world)
                yield batch


class ValData:
    """The fixed validation windows: the first `eval_tokens` ids of val, in order, without randomness.

    They come in groups of `group` windows whose make-up does not depend on the number of ranks, so that every group's
    loss is the same number wherever it is computed. Raises UserError when val is shorter than one window.
    """

    def __init__(self, folder, block_size, eval_tokens, group):
        self.tokens = Tokens(folder, "val")
        self.block_size, self.group = block_size, group
        self.n_windows = min(len(self.tokens) - 1, eval_tokens) // block_size
        if self.n_windows < 1:
            raise UserError(
                f"{folder}: val has {len(self.tokens):,} tokens, eval_tokens is {eval_tokens:,}: both must reach "
                f"block_size + 1 = {block_size + 1}"
            )
        self.n_groups = -(-self.n_windows // group)

    def batch(self, g):
        """Inputs and targets (≤ group, block_size) int64 of group g."""
        numbers = range(g * self.group, min((g + 1) * self.group, self.n_windows))
        return self.tokens.windows(numbers, self.block_size)
