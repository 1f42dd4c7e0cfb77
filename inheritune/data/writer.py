"""Writing a data folder, so that a kill costs a minute of work.

A data folder holds little-endian uint16 ids (uint32 where ids exceed 65,535) in train.bin and val.bin or in
numbered shards, and a meta.json that describes them. It is made in parts of about 100 million tokens. After
each, progress.json says which there are and how many pieces of text they took; a run that finds it passes
over as many pieces and goes on, so the result is the same to the last bit. In the end the parts are the
shards, or are joined. meta.json is written last: a folder without it is unfinished.
"""

import collections
import contextlib
import functools
import importlib.metadata
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from inheritune.base.errors import UserError
from inheritune.base.files import lock_folder, read_json, replacing, sha256, unlock_folder, write_json
from inheritune.data.sources import Piece, Source
from inheritune.data.tokenizer import Tokenizer, utf8

FORMAT = 1
PART = 10**8  # tokens
BATCH = 1 << 18  # characters that a thread tokenises at a time
COUNTS = ("tokens", "documents", "bytes")
UNFINISHED = re.compile(r"(train|val|all)_\d{6}\.part|\..*\.(part|bin|json)\.tmp|progress\.json")
OURS = re.compile(UNFINISHED.pattern + r"|(train|val)(_\d{6})?\.bin|(tokenizer|tokenizer_config)\.json")


class TooLittle(UserError):
    """All text of a source is read, and a split has none of it."""


def write_tokens(
    out: str,
    script: str,
    source: Source,
    tokenizer: Tokenizer,
    threads: int,
    val_fraction: float | None = None,
    shard_tokens: int | None = None,
    max_tokens: int = sys.maxsize,
) -> dict:
    """Tokenise a source into the data folder `out`, from where an earlier run stopped. Returns its meta.json.

    script: the command's name, for meta.json
    threads: how many tokenise
    val_fraction: hold out this share of the tokens, from the end; only for a source without validation text
    shard_tokens: write shards of about so many tokens, the first for validation, instead of two files
    max_tokens: stop after about so many

    Raises UserError when the folder was made or begun from another input or with other settings, is not ours,
    or is being written by another run.
    """
    if threads < 1:
        raise UserError(f"--num_proc {threads} must be at least 1")
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "tiktoken", "tokenizers")}
    made = {"script": script, "arguments": source.arguments, "versions": versions}
    note = {"format": FORMAT, "tokenizer": tokenizer.describe(), "made": made}
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
    with own_folder(out):
        if os.path.exists(os.path.join(out, "meta.json")):
            return check_finished(out, note)
        progress = open_progress(out, note, dtype)
        try:
            pieces = itertools.islice(source.pieces, progress["pieces"], None)
            size = min(BATCH, 1 + (shard_tokens or PART) // 10)  # so that no shard gets much too long
            encode = functools.partial(tokenise, tokenizer, dtype)
            batches = in_order(encode, batched(pieces, size), threads)
            write_parts(out, batches, progress, shard_tokens, max_tokens)
            if shard_tokens:
                shards = [bin_entry(out, entry["file"], [entry]) for entry in progress["files"]]
            elif val_fraction:
                shards = part_off(out, progress["files"], tokenizer, dtype, val_fraction)
            else:
                shards = [join(out, f"{split}.bin", progress["files"], split) for split in ("train", "val")]
            return finish(out, note | {"dtype": dtype.name}, shards, tokenizer, progress["files"])
        except BaseException as e:
            if not progress["parts"] or isinstance(e, TooLittle):  # there is nothing to go on with
                clear(out, OURS)
            raise


def write_parts(
    out: str, batches: Iterator[tuple], progress: dict, shard_tokens: int | None, most: int
) -> None:
    """Write batches of ids into parts until they come to `most` tokens, and note each part in `progress`."""
    with tqdm(unit="tok", unit_scale=True, desc=out) as bar:
        while (tokens := add_up(progress["files"])["tokens"]) < most:
            names = part_names(progress["parts"], shard_tokens)
            wanted = min(shard_tokens or PART, most - tokens)
            files, n_pieces = write_part(out, names, batches, wanted, bar, tokens)
            if not n_pieces:
                break
            progress["files"] += files
            progress |= {"parts": progress["parts"] + 1, "pieces": progress["pieces"] + n_pieces}
            write_json(os.path.join(out, "progress.json"), progress)


# Text to ids


def batched(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Yield lists of pieces, each of about `size` characters."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text) + 20  # so that a million empty documents are no single batch
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def in_order(work: Callable, items: Iterable, threads: int) -> Iterator[tuple]:
    """Yield (work(item), item) in input order, while threads work on the next ones."""
    waiting = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append((pool.submit(work, item), item))
            if len(waiting) == 2 * threads:
                result, item = waiting.popleft()
                yield result.result(), item
        for result, item in waiting:
            yield result.result(), item


def tokenise(tokenizer: Tokenizer, dtype: np.dtype, batch: list[Piece]) -> dict[str, tuple]:
    """{split: (ids, [tokens, documents, bytes of text, times that end-of-text is spelled out])} of a batch.
    An end-of-text id follows each document."""
    found = {}
    arrays = tokenizer.encode_batch([piece.text for piece in batch], [piece.goes_on for piece in batch])
    for split in {piece.split for piece in batch}:
        own = [piece for piece in batch if piece.split == split]
        ids = [ids for piece, ids in zip(batch, arrays, strict=True) if piece.split == split]
        ends = np.cumsum([len(some) for some in ids])[[piece.end for piece in own]]
        ids = np.insert(np.concatenate(ids).astype(dtype), ends, tokenizer.eot)
        text = "\0".join(piece.text for piece in own)  # counting in one text is faster
        n_bytes = len(utf8(text)) - (len(own) - 1)
        found[split] = ids, [len(ids), len(ends), n_bytes, text.count(tokenizer.end_of_text)]
    return found


# Parts


def part_names(number: int, shard_tokens: int | None) -> dict[str, str]:
    """{split of the text: file} of part 3: {"train": "train_000003.part", "val": "val_000003.part"}; of shard
    3 {"train": "train_000002.bin"}. All text has the split "train" here; shard 0 is used for validation."""
    if shard_tokens:
        return {"train": f"train_{number - 1:06d}.bin" if number else "val_000000.bin"}
    return {split: f"{split}_{number:06d}.part" for split in ("train", "val")}


def write_part(
    out: str, names: dict[str, str], batches: Iterator[tuple], size: int, bar: tqdm, before: int
) -> tuple[list[dict], int]:
    """Write batches until they come to `size` tokens; earlier parts have `before`. Returns (an entry for each
    file, the number of pieces, 0 when there was none left)."""
    files, sums, pieces, written = {}, {}, 0, 0
    with contextlib.ExitStack() as stack:
        for encoded, batch in batches:
            for split, (ids, counts) in encoded.items():
                if split not in files:
                    files[split] = stack.enter_context(replacing(os.path.join(out, names[split])))
                files[split].write(ids.data)
                sums[split] = [a + b for a, b in zip(sums.get(split, [0] * 4), counts, strict=True)]
                written += len(ids)
            pieces += len(batch)
            if share := batch[
                -1
            ].progress:  # what the text so far came to gives the total, and the remaining time
                bar.total = round((before + written) / share)
            bar.update(before + written - bar.n)
            if written >= size:
                break
    keys = (*COUNTS, "spelled")
    return [{"file": names[s]} | dict(zip(keys, counts, strict=True)) for s, counts in sums.items()], pieces


def join(out: str, name: str, entries: list[dict], split: str) -> dict:
    """Write the parts of a split into one file; its entry in meta.json."""
    entries = [entry for entry in entries if entry["file"].startswith(split)]
    with replacing(os.path.join(out, name)) as f:
        for entry in entries:
            with open(os.path.join(out, entry["file"]), "rb") as part:
                shutil.copyfileobj(part, f, 1 << 20)
    return bin_entry(out, name, entries)


def part_off(out: str, entries: list[dict], tokenizer: Tokenizer, dtype: np.dtype, fraction: float) -> list:
    """Write train.bin and, with this share of the tokens from the end, val.bin; their entries in meta.json.

    Validation begins where a document does, if one does within a tenth of its length, or else inside one.
    """
    whole, eot = join(out, "all_000000.part", entries, "train"), np.array([tokenizer.eot], dtype)
    ids = np.memmap(os.path.join(out, whole["file"]), dtype, "r")
    place, reach = round(len(ids) * (1 - fraction)), 1 + int(len(ids) * fraction / 10)
    first = max(0, place - reach)
    begins = first + 1 + np.flatnonzero(ids[first : min(place + reach, len(ids) - 1)] == eot)
    if len(begins):
        place = int(begins[np.abs(begins - place).argmin()])
    while 0 < place < len(ids) and tokenizer.decode_bytes([ids[place]])[0] & 0xC0 == 0x80:
        place += 1  # not inside a character
    if not 0 < place < len(ids) - 1:
        raise TooLittle(f"{out}: too little text to part into training and validation; give more")

    ends = eot[: int(ids[place - 1] != tokenizer.eot)]  # the end-of-text of a document that is cut
    for name, arrays in (("train.bin", (ids[:place], ends)), ("val.bin", (ids[place:],))):
        with replacing(os.path.join(out, name)) as f:
            for array in arrays:
                f.write(array.data)
    val = {"tokens": len(ids) - place, "documents": 0, "bytes": 0}
    for start in range(place, len(ids), 1 << 20):  # a piece at a time, as decoding takes lists
        piece = np.asarray(ids[start : start + (1 << 20)])
        val["documents"] += int((piece == eot).sum())
        val["bytes"] += len(tokenizer.decode_bytes(piece[piece != eot].tolist()))
    train = {key: whole[key] - val[key] for key in COUNTS}
    cut = {"tokens": len(ends), "documents": len(ends), "bytes": 0}
    return [bin_entry(out, "train.bin", [train, cut]), bin_entry(out, "val.bin", [val])]


# The folder


@contextlib.contextmanager
def own_folder(out: str) -> Iterator[None]:
    """Make and lock the folder `out`. A new one is removed again if it stays empty."""
    is_new = not os.path.exists(out)
    if not is_new and not os.path.isdir(out):
        raise UserError(f"{out} is a file; --out names a folder")
    os.makedirs(out, exist_ok=True)
    if (lock := lock_folder(out)) is None:
        raise UserError(f"{out} is being written by another run; wait or choose another --out")
    try:
        yield
    finally:
        unlock_folder(out, lock)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(out)


def open_progress(out: str, note: dict, dtype: np.dtype) -> dict:
    """What an earlier run noted in progress.json, or what a new one does."""
    path = os.path.join(out, "progress.json")
    if os.path.exists(path):
        progress = read_json(path)
        check_same(out, "begun", progress, note)
        check_files(out, progress["files"], dtype)
        print(f"{out}: going on after {add_up(progress['files'])['tokens']:,} tokens", file=sys.stderr)
        return progress
    if any(not name.startswith(".") for name in os.listdir(out)):
        raise UserError(f"{out} is not empty and was not made by this script; choose another --out")
    progress = note | {"parts": 0, "pieces": 0, "files": []}
    write_json(path, progress)
    return progress


def check_same(out: str, state: str, old: dict, new: dict) -> None:
    """Raise UserError unless a meta.json or progress.json tells of the same input and settings."""
    try:
        was, now = (
            {"script": note["made"]["script"], "tokenizer": note["tokenizer"]} | note["made"]["arguments"]
            for note in (old, new)
        )
    except (KeyError, TypeError):
        raise UserError(f"{out} was not written by this script; choose another --out") from None
    for key in now | was:
        if was.get(key) != now.get(key) and key != "sources":  # where the text lies, not what it is
            what = f"with {key} {was.get(key)!r}, not {now.get(key)!r}"
            what = "its input has changed" if key in ("files", "bytes", "content_sha256") else what
            raise UserError(f"{out} is {state}, but {what}; choose another --out or delete it")


def check_files(out: str, entries: list[dict], dtype: np.dtype) -> None:
    for entry in entries:
        path = os.path.join(out, entry["file"])
        if not os.path.exists(path) or os.path.getsize(path) != entry["tokens"] * dtype.itemsize:
            raise UserError(f"{path} is missing or not as long as it was; delete {out} and run again")


def check_finished(out: str, note: dict) -> dict:
    """Say that `out` is finished, and return its meta.json."""
    meta = read_json(os.path.join(out, "meta.json"))
    check_same(out, "finished", meta, note)
    shards = [shard for split in meta["splits"].values() for shard in split["shards"]]
    check_files(out, shards, np.dtype(meta["dtype"]))
    clear(out, UNFINISHED)  # a kill just before the end leaves a little
    print(f"{out} is already finished: {summary(meta['splits'])}")
    return meta


def finish(out: str, note: dict, shards: list[dict], tokenizer: Tokenizer, parts: list[dict]) -> dict:
    """Write meta.json, which makes the folder a finished one, and return it; the parts are removed."""
    splits = {}
    for split in ("train", "val"):
        own = [shard for shard in shards if shard["file"].startswith(split)]
        splits[split] = add_up(own) | {"shards": own}
        if not splits[split]["tokens"]:
            raise TooLittle(f"{out}: no text is left for {split}; give more text, or ask for smaller shards")
    for name, content in tokenizer.files.items():
        with replacing(os.path.join(out, name)) as f:
            f.write(content)
    meta = note | {"splits": splits}
    write_json(os.path.join(out, "meta.json"), meta)
    clear(out, UNFINISHED)
    print(f"{out}: {summary(splits)}")
    if spelled := sum(part["spelled"] for part in parts):
        marker = tokenizer.end_of_text
        what = f"the text holds {marker} {spelled:,} times, which is ordinary text here"
        print(f"note: {what}; where it parts a file's documents, --split_on '{marker}' makes it do so")
    return meta


def clear(out: str, pattern: re.Pattern) -> None:
    """Remove the files of a folder whose names match. progress.json is the last to go: while it is there, the
    next run knows the folder as ours."""
    for name in sorted(os.listdir(out), key=lambda name: name == "progress.json"):
        if pattern.fullmatch(name):
            os.unlink(os.path.join(out, name))


def add_up(entries: list[dict]) -> dict:
    return {key: sum(entry[key] for entry in entries) for key in COUNTS}


def bin_entry(out: str, name: str, entries: list[dict]) -> dict:
    """The entry in meta.json of a file that holds the tokens of these entries."""
    return {"file": name} | add_up(entries) | {"sha256": sha256(os.path.join(out, name))}


def summary(splits: dict) -> str:
    parts = (f"{name} {s['tokens']:,} tokens in {s['documents']:,} documents" for name, s in splits.items())
    return ", ".join(parts)
