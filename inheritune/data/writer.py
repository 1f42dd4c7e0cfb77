"""Writing a data folder, so that a kill costs little of the work.

A data folder holds little-endian uint16 ids (uint32 where ids exceed 65,535) in train.bin and val.bin or in
numbered shards, and a meta.json that describes them. It is made in parts of about 100 million tokens. After
each, progress.json lists the parts and how many pieces of text they took. A new run reads these pieces
without tokenising them, and goes on, so the result is the same to the last bit. In the end the parts are the
shards, or are joined. meta.json is written last: a folder without it is unfinished.
"""

import collections
import contextlib
import functools
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
from inheritune.data.sources import Source
from inheritune.data.text_files import Piece
from inheritune.data.tokenizer import Tokenizer, utf8

FORMAT = 1
PART = 10**8  # tokens
BATCH = 1 << 18  # characters that a thread tokenises at a time
COUNTS = ("tokens", "documents", "bytes")
UNFINISHED = re.compile(r"(train|val|all)_\d{6}\.part|\..*\.(part|bin|json)\.tmp|progress\.json")
WRITTEN = re.compile(UNFINISHED.pattern + r"|(train|val)(_\d{6})?\.bin|(tokenizer|tokenizer_config)\.json")


def write_tokens(
    out: str,
    script: str,
    source: Source,
    tokenizer: Tokenizer,
    threads: int,
    val_fraction: float | None = None,
    shard_tokens: int | None = None,
    max_tokens: int = sys.maxsize,
) -> None:
    """Tokenise a source into the data folder `out`, from where an earlier run stopped.

    script: the command's name, for meta.json
    threads: how many tokenise at a time
    val_fraction: hold out this share of the tokens, from the end; only for a source without validation text
    shard_tokens: write shards of about so many tokens, the first for validation, instead of two files
    max_tokens: stop after about so many

    Raises UserError when the folder was made or begun from another input or with other settings, is not ours,
    or is being written by another run.
    """
    if threads < 1:
        raise UserError(f"--num_proc {threads} must be at least 1")
    made = {"script": script, "arguments": source.arguments}
    note = {"format": FORMAT, "tokenizer": tokenizer.describe(), "made": made}
    dtype, size = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4"), shard_tokens or PART
    with own_folder(out):
        if os.path.exists(os.path.join(out, "meta.json")):
            return check_finished(out, note)
        # note | {"parts": 2, "pieces_done": 900, "files": [{"file": "train_000000.part", "tokens": …}, …]}
        progress = open_progress(out, note, dtype)
        try:
            pieces = itertools.islice(source.pieces, progress["pieces_done"], None)
            encode = functools.partial(tokenise, tokenizer, dtype)
            # a tenth of a part at most, so that no part gets much too long
            ordered = in_order(encode, batched(pieces, min(BATCH, 1 + size // 10)), threads)
            with contextlib.closing(ordered) as batches:  # its threads end here, also after an error
                write_parts(out, batches, progress, size, max_tokens, bool(shard_tokens))
            shards = parts = progress["files"]  # with shard_tokens the parts already have their final names
            if val_fraction:
                shards = split_validation(out, parts, tokenizer, dtype, val_fraction)
            elif not shard_tokens:
                shards = [join(out, f"{split}.bin", parts, split) for split in ("train", "val")]
            finish(out, note | {"dtype": dtype.name}, shards, tokenizer)
            if spelled := sum(part["spelled"] for part in parts):
                marker = tokenizer.end_of_text
                what = f"the text holds {marker} {spelled:,} times, which is ordinary text here"
                cure = f"; if it separates documents of text files, prepare with --split_on '{marker}'"
                print(f"note: {what}{cure if script == 'prepare.py' else ''}")
        except BaseException:
            has_part = add_up(progress["files"])["tokens"] >= size  # a whole one to go on with
            if not has_part and not os.path.exists(os.path.join(out, "meta.json")):
                clear(out, WRITTEN)
            raise


# Text to ids


def batched(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Yield lists of pieces, each of about `size` characters."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += sum(map(len, piece.texts)) + 20  # so that a million empty rows do not become one batch
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
    """{split: (ids, {tokens, documents, bytes of text, times that end-of-text is spelled out})} of a batch.
    An end-of-text id follows each document."""
    found = {}
    for split in {piece.split for piece in batch}:
        texts, continues, ends = [], [], []
        for piece in batch:
            if piece.split == split:
                others = len(piece.texts) - 1
                texts += piece.texts
                continues += [piece.continues] + [False] * others
                ends += [True] * others + [piece.end]
        ids, lengths = tokenizer.encode_batch(texts, continues)
        ids = np.insert(ids.astype(dtype), np.cumsum(lengths)[ends], tokenizer.eot)
        whole = "\0".join(texts)  # counting in one text is faster
        n_bytes = len(utf8(whole)) - (len(texts) - 1)
        counts = {"tokens": len(ids), "documents": sum(ends), "bytes": n_bytes}
        found[split] = ids, counts | {"spelled": whole.count(tokenizer.end_of_text)}
    return found


# Parts


def write_parts(
    out: str, batches: Iterator[tuple], progress: dict, size: int, most: int, are_shards: bool
) -> None:
    """Write batches of ids into parts of `size` tokens until they come to `most`; note each in `progress`."""
    total = add_up(progress["files"])["tokens"]
    with tqdm(unit="tok", unit_scale=True, desc=out) as bar:
        while total < most and (first := next(batches, None)):
            entries, target = new_part(progress["parts"], are_shards), min(total + size, most)
            with contextlib.ExitStack() as stack:
                paths = {split: os.path.join(out, entry["file"]) for split, entry in entries.items()}
                files = {split: stack.enter_context(replacing(path)) for split, path in paths.items()}
                for encoded, batch in itertools.chain([first], batches):
                    for split, (ids, counts) in encoded.items():
                        files[split].write(ids.data)
                        entries[split] |= {key: entries[split][key] + n for key, n in counts.items()}
                        total += len(ids)
                    progress["pieces_done"] += len(batch)
                    if share := batch[-1].progress:
                        bar.total = round(total / share)  # from which the remaining time follows
                    bar.update(total - bar.n)
                    if total >= target:
                        break
            progress["files"] += entries.values()
            progress["parts"] += 1
            write_json(os.path.join(out, "progress.json"), progress)


def new_part(number: int, is_shard: bool) -> dict[str, dict]:
    """{split: entry} of the files of part `number`.

    Part 3: train_000003.part and val_000003.part. Shard 0: val_000000.bin; shard 3: train_000002.bin (with
    shards all text has the split "train").
    """
    names = {split: f"{split}_{number:06d}.part" for split in ("train", "val")}
    if is_shard:
        names = {"train": f"train_{number - 1:06d}.bin" if number else "val_000000.bin"}
    return {split: {"file": name} | dict.fromkeys((*COUNTS, "spelled"), 0) for split, name in names.items()}


def join(out: str, name: str, parts: list[dict], split: str) -> dict:
    """Write the parts of a split into one file. Returns the file's entry."""
    entries = [part for part in parts if part["file"].startswith(split)]
    with replacing(os.path.join(out, name)) as f:
        for entry in entries:
            with open(os.path.join(out, entry["file"]), "rb") as part:
                shutil.copyfileobj(part, f, 1 << 20)
    return {"file": name} | add_up(entries)


def begins_inside_character(text: bytes) -> bool:
    """Whether a token's text begins with the rest of a UTF-8 character. A tokenizer.json decodes a part of a
    character to U+FFFD, and a lone blank may decode to nothing."""
    return text[:1] > b"\x7f" and (text[0] & 0xC0 == 0x80 or text.startswith("\ufffd".encode()))


def split_validation(
    out: str, parts: list[dict], tokenizer: Tokenizer, dtype: np.dtype, fraction: float
) -> list:
    """Write train.bin and, with this share of the tokens from the end, val.bin. Returns their entries.

    Validation begins at the start of the document nearest to the cut. If none starts within a tenth of
    validation's length, it begins at the cut.
    """
    train, eot = [p for p in parts if p["file"].startswith("train")], np.array([tokenizer.eot], dtype)
    whole = train[0] if len(train) == 1 else join(out, "all_000000.part", parts, "train")
    path = os.path.join(out, whole["file"])
    ids = np.memmap(path, dtype, "r") if whole["tokens"] else eot[:0]  # an empty file cannot be mapped
    place, reach = round(len(ids) * (1 - fraction)), 1 + int(len(ids) * fraction / 10)
    first = max(0, place - reach)
    begins = first + 1 + np.flatnonzero(ids[first : min(place + reach, len(ids) - 1)] == eot)
    if len(begins):
        place = int(begins[np.abs(begins - place).argmin()])
    else:  # inside a document, but not inside a character
        while 0 < place < len(ids) and begins_inside_character(tokenizer.decode_bytes([ids[place]])):
            place += 1
    if not 0 < place < len(ids) - 1:
        raise UserError(f"{out}: too little text to part into training and validation; give more")

    ends = eot[: int(ids[place - 1] != tokenizer.eot)]  # the end-of-text of a document that is cut
    for name, arrays in (("train.bin", (ids[:place], ends)), ("val.bin", (ids[place:],))):
        with replacing(os.path.join(out, name)) as f:
            for array in arrays:
                f.write(array.data)
    val, end = {"tokens": len(ids) - place, "documents": 0, "bytes": 0}, 0
    for part in train:
        begin, end = end, end + part["tokens"]
        if begin >= place:  # all of it is validation
            val |= {key: val[key] + part[key] for key in ("documents", "bytes")}
            continue
        for start in range(place, end, 1 << 20):  # a piece at a time, as decoding takes lists
            piece = np.asarray(ids[start : min(start + (1 << 20), end)])
            ends_here = np.flatnonzero(piece == eot)
            val["documents"] += len(ends_here)
            for text in np.split(piece, ends_here):  # each alone: some tokenizers put a blank before a text
                val["bytes"] += len(tokenizer.decode_bytes(text[text != eot].tolist()))
    train = {key: whole[key] - val[key] for key in COUNTS}
    cut = {"tokens": len(ends), "documents": len(ends), "bytes": 0}
    return [{"file": "train.bin"} | add_up([train, cut]), {"file": "val.bin"} | val]


# The folder


@contextlib.contextmanager
def own_folder(out: str) -> Iterator[None]:
    """Make and lock the folder `out`. A new one is removed again if it stays empty."""
    is_new = not os.path.exists(out)
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
    """The progress.json of an earlier run, or that of a new one."""
    path = os.path.join(out, "progress.json")
    if os.path.exists(path):
        progress = read_json(path)
        if "pieces_done" not in progress:
            raise UserError(f"{out} was begun by another version of this script: delete it and run again")
        check_same(out, "begun", progress, note)
        check_files(out, progress["files"], dtype)
        print(f"{out}: going on after {add_up(progress['files'])['tokens']:,} tokens", file=sys.stderr)
        return progress
    if any(not name.startswith(".") for name in os.listdir(out)):
        raise UserError(f"{out} is not empty and was not made by this script; choose another --out")
    progress = note | {"parts": 0, "pieces_done": 0, "files": []}
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


def check_finished(out: str, note: dict) -> None:
    """Say that `out` is finished. Raises UserError if it was made from something else or is damaged."""
    meta = read_json(os.path.join(out, "meta.json"))
    check_same(out, "finished", meta, note)
    shards = [shard for split in meta["splits"].values() for shard in split["shards"]]
    check_files(out, shards, np.dtype(meta["dtype"]))
    clear(out, UNFINISHED)  # a kill just before the end leaves a little
    print(f"{out} is already finished: {summary(meta['splits'])}")


def finish(out: str, note: dict, shards: list[dict], tokenizer: Tokenizer) -> None:
    """Write meta.json, which makes the folder a finished one; the parts are removed."""
    splits = {}
    for split in ("train", "val"):
        own = [
            {"file": shard["file"]} | add_up([shard]) | {"sha256": sha256(os.path.join(out, shard["file"]))}
            for shard in shards
            if shard["file"].startswith(split)
        ]
        splits[split] = add_up(own) | {"shards": own}
        if not splits[split]["tokens"]:
            cure = "give more text, or ask for smaller shards and another --out"
            raise UserError(f"{out}: no text is left for {split}; {cure}")
    for name, content in tokenizer.files.items():
        with replacing(os.path.join(out, name)) as f:
            f.write(content)
    write_json(os.path.join(out, "meta.json"), note | {"splits": splits})
    clear(out, UNFINISHED)
    print(f"{out}: {summary(splits)}")


def clear(out: str, pattern: re.Pattern) -> None:
    """Remove the files of a folder whose names match. progress.json is the last to go: while it is there, the
    next run knows the folder as ours."""
    for name in sorted(os.listdir(out), key=lambda name: name == "progress.json"):
        if pattern.fullmatch(name):
            os.unlink(os.path.join(out, name))


def add_up(entries: list[dict]) -> dict[str, int]:
    return {key: sum(entry[key] for entry in entries) for key in COUNTS}


def summary(splits: dict) -> str:
    parts = (f"{name} {s['tokens']:,} tokens in {s['documents']:,} documents" for name, s in splits.items())
    return ", ".join(parts)
