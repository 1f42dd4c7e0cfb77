"""Writing a data folder, so that a kill costs a second of work.

A data folder holds little-endian uint16 ids (uint32 where ids exceed 65,535) in train.bin and val.bin or in
numbered shards, and a meta.json that describes them. While it is made, tokens go to NAME.partial, and every
second progress.json records how far the input was read and how long each file was then. A run that finds a
progress.json cuts the files back to those lengths and goes on from there, so the result is the same to the
last bit. meta.json is written last: a folder without it is unfinished.
"""

import collections
import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from inheritune.base.errors import UserError
from inheritune.base.files import (
    lock_folder,
    read_json,
    replacing,
    sha256,
    sync_folder,
    unlock_folder,
    write_json,
)
from inheritune.data.sources import Piece
from inheritune.data.tokenizer import Tokenizer, utf8

FORMAT = 1
RECORD_EVERY = 1.0  # seconds between two records of the progress
BATCH = 1 << 18  # characters that a thread tokenises at a time
TRAIN_VAL = {"train": ["train.bin"], "val": ["val.bin"]}
DOWNLOADED = re.compile(r"\.?[0-9a-f]{12}-.*")
BIN, NOTE = r"(train|val)(_\d{6})?\.bin", r"\.?(meta|progress|tokenizer|tokenizer_config)\.json"
OURS = re.compile(rf"{BIN}(\.partial)?|{NOTE}(\.tmp)?")
UNFINISHED = re.compile(rf"{BIN}\.partial|{NOTE}\.tmp|\.?progress\.json")


def write_tokens(
    writer: "BinWriter", pieces: Callable[[list], Iterator[Piece]], stream_of: Callable, threads: int
) -> dict:
    """Tokenise the text of `pieces(at)`, from where the opened `writer` stands, and finish its folder.

    `stream_of(i)` names the stream of document number i. Returns the meta.json.
    """
    batches = batched(pieces(writer.at), stream_of, writer.documents)
    work = functools.partial(encode_batch, writer.tokenizer, writer.dtype)
    bar = tqdm(initial=writer.tokens, unit="tok", unit_scale=True, desc=writer.out, dynamic_ncols=True)
    recorded = time.monotonic()
    with ThreadPoolExecutor(threads) as pool, bar:
        for encoded, documents, piece in in_order(pool, work, batches, 2 * threads):
            writer.append(encoded, piece.at, documents)
            if piece.done:  # what the text so far came to gives the total, and with it the remaining time
                bar.total = min(writer.max_tokens, round(writer.tokens / piece.done))
            bar.update(writer.tokens - bar.n)
            if writer.tokens >= writer.max_tokens:
                break
            if time.monotonic() - recorded >= RECORD_EVERY:
                writer.record()
                recorded = time.monotonic()
    return writer.finish()


def batched(pieces: Iterable[Piece], stream_of: Callable, documents: int) -> Iterator[tuple]:
    """Yield ([(stream, text, ends), …], documents ended after it, its last piece) of about BATCH characters.

    `documents` is how many documents ended before the first piece.
    """
    batch, size = [], 0
    for piece in pieces:
        batch.append((stream_of(documents), piece.text, piece.end))
        documents += piece.end
        size += len(piece.text) + 20  # so that a million empty documents are no single batch
        if size >= BATCH:
            yield batch, documents, piece
            batch, size = [], 0
    if batch:
        yield batch, documents, piece


def encode_batch(tokenizer: Tokenizer, dtype: np.dtype, batch: list) -> dict[str, tuple]:
    """{stream: (ids, [documents ended, bytes of text, times that end-of-text is spelled out in it])} of a
    batch, with an end-of-text id after each document."""
    eot = np.array([tokenizer.eot], dtype)
    encoded = {stream: ([], np.zeros(3, int)) for stream, _, _ in batch}
    arrays = tokenizer.encode_batch([text for _, text, _ in batch])
    for (stream, text, ends), ids in zip(batch, arrays, strict=True):
        parts, counts = encoded[stream]
        parts += [ids.astype(dtype), eot] if ends else [ids.astype(dtype)]
        counts += ends, len(utf8(text)), text.count(tokenizer.end_of_text)
    return {stream: (np.concatenate(parts), counts.tolist()) for stream, (parts, counts) in encoded.items()}


def in_order(pool: ThreadPoolExecutor, work: Callable, items: Iterable[tuple], ahead: int) -> Iterator[tuple]:
    """Yield (work(first), *rest) of each (first, *rest) in input order, at most `ahead` of them under way."""
    waiting = collections.deque()
    for first, *rest in items:
        waiting.append((pool.submit(work, first), rest))
        if len(waiting) == ahead:
            result, rest = waiting.popleft()
            yield result.result(), *rest
    for result, rest in waiting:
        yield result.result(), *rest


class BinWriter:
    """Writes one data folder: `open`, `append` batches, `record` now and then, `finish`. A context, which
    releases the folder, and leaves it as it was found if the run fails before anything was appended.

    A stream of tokens becomes one .bin file after the other; each but its last holds exactly `shard_tokens`
    tokens. `arguments` are JSON values: all that decides the tokens, besides the tokenizer, and nothing else.
    """

    def __init__(
        self,
        out: str,
        script: str,
        arguments: dict,
        tokenizer: Tokenizer,
        streams: dict[str, Iterable[str]] = TRAIN_VAL,  # {stream: the names of its files}
        shard_tokens: int = sys.maxsize,
        max_tokens: int = sys.maxsize,  # over all streams
    ):
        self.out, self.tokenizer = out, tokenizer
        self.shard_tokens, self.max_tokens = shard_tokens, max_tokens
        self.dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
        packages = ("numpy", "tiktoken", *(["tokenizers"] if tokenizer.sha256 else []))
        versions = {"python": platform.python_version()}
        versions |= {package: importlib.metadata.version(package) for package in packages}
        self.made = {"script": script, "arguments": arguments, "versions": versions}
        self.names = {stream: iter(names) for stream, names in streams.items()}
        # as in meta.json: with a sha256 once a file is complete
        self.shards = {stream: [] for stream in streams}
        self.files = {}  # {stream: the open file of its last shard}
        self.at, self.documents, self.tokens = [0, 0], 0, 0  # where reading goes on; how much came before
        self.spelled = 0  # times that the text so far holds end-of-text, spelled out
        self.lock, self.new, self.opened = None, not os.path.exists(out), False

    def open(self) -> bool:
        """Take the folder and go on from its progress.json; False when it is finished with these arguments.

        What was begun with other arguments is thrown away. Raises UserError when the folder is finished with
        others, is not ours, or is being written by another run.
        """
        if os.path.exists(self.out) and not os.path.isdir(self.out):
            raise UserError(f"{self.out} is a file; --out names a folder")
        os.makedirs(self.out, exist_ok=True)
        self.lock = lock_folder(self.out)
        if self.lock is None:
            raise UserError(f"{self.out} is being written by another run; wait or choose another --out")
        if os.path.exists(self._path("meta.json")):
            check_finished(self.out, self.made, self.tokenizer.describe())
            return False
        if os.path.exists(self._path("progress.json")):
            progress = read_json(self._path("progress.json"))
            if progress.get("made") == self.made and progress.get("tokenizer") == self.tokenizer.describe():
                self._resume(progress)
            else:
                print(f"{self.out}: the unfinished part has other settings; starting afresh", file=sys.stderr)
                clear(self.out)
        elif any(not name.startswith(".") for name in os.listdir(self.out)):
            raise UserError(f"{self.out} is not empty and was not made by this script; choose another --out")
        self.opened = True
        self.record()
        return True

    def _resume(self, progress):
        """Go on from a record: cut each unfinished file back to it, and forget what was written after it."""
        self.at, self.documents = progress["at"], progress["documents"]
        self.spelled, self.shards = progress["spelled"], progress["streams"]
        for stream, shards in self.shards.items():
            for shard, name in zip(shards, self.names[stream], strict=False):
                path, size = self._path(name), shard["tokens"] * self.dtype.itemsize
                self.tokens += shard["tokens"]
                complete = "sha256" in shard
                found = path if complete else path + ".partial"
                if not complete and os.path.exists(path):  # completed between the record and the kill
                    os.replace(path, found)
                if not os.path.exists(found) or os.path.getsize(found) < size:
                    raise UserError(f"{path} is missing or too short; delete {self.out} and run again")
                if not complete:
                    os.truncate(found, size)
                    self.files[stream] = open(found, "ab")  # noqa: SIM115 (closed by `_complete`)
        if self.tokens:
            print(f"{self.out}: going on after {self.tokens:,} tokens", file=sys.stderr)

    def append(self, encoded: dict[str, tuple], at: list, documents: int) -> None:
        """Write a batch, as `encode_batch` gives it; reading goes on at `at` after it, where `documents` have
        ended."""
        for stream, (ids, (ended, n_bytes, spelled)) in encoded.items():
            self.spelled += spelled
            if len(ids) > self.max_tokens - self.tokens:
                ids = ids[: self.max_tokens - self.tokens]
                ended, n_bytes = self._measure(ids)
            while len(ids):
                shard = self._open_shard(stream)
                part, ids = np.split(ids, [self.shard_tokens - shard["tokens"]])
                counts = self._measure(part) if len(ids) else (ended, n_bytes)
                self.files[stream].write(part.data)
                self.tokens += len(part)
                shard["tokens"] += len(part)
                shard["documents"] += counts[0]
                shard["bytes"] += counts[1]
                ended, n_bytes = ended - counts[0], n_bytes - counts[1]
                if shard["tokens"] == self.shard_tokens:
                    self._complete(stream)
        self.at, self.documents = at, documents

    def record(self) -> None:
        """Put what was appended on disk, and then a note of it into progress.json."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        progress = {"tokenizer": self.tokenizer.describe(), "made": self.made, "at": self.at}
        progress |= {"documents": self.documents, "spelled": self.spelled, "streams": self.shards}
        write_json(self._path("progress.json"), progress)

    def finish(self) -> dict:
        """Write meta.json, which makes the folder a finished one, remove what only an unfinished one needs,
        and return it. Raises UserError, and leaves the folder unfinished, when a split got no token."""
        for stream in list(self.files):
            self._complete(stream)
        self.record()
        shards = [shard for shards in self.shards.values() for shard in shards]
        splits = {split: totals([s for s in shards if s["file"].startswith(split)]) for split in TRAIN_VAL}
        for split, content in splits.items():
            if not content["shards"]:
                raise UserError(
                    f"{self.out}: no text is left for {split}; give more text, or ask for smaller shards"
                )
        for name, content in self.tokenizer.files.items():
            with replacing(self._path(name)) as f:
                f.write(content)
        meta = {"format": FORMAT, "tokenizer": self.tokenizer.describe(), "dtype": self.dtype.name}
        meta |= {"splits": splits, "made": self.made}
        write_json(self._path("meta.json"), meta)
        clear(self.out, finished=True)
        print(f"{self.out}: {summary(splits)}")
        if self.spelled:
            marker = self.tokenizer.end_of_text
            print(
                f"note: the text holds {marker} {self.spelled:,} times, which is ordinary text here; in text "
                f"files where it parts documents, --split_on '{marker}' makes it do so"
            )
        return meta

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        for file in self.files.values():
            file.close()
        downloads = self._path("download")
        kept = os.path.isdir(downloads) and os.listdir(downloads)
        nothing = failed and self.opened and self.at == [0, 0] and not kept
        try:
            if nothing:
                clear(self.out)
        finally:
            if self.lock is not None:
                unlock_folder(self.out, self.lock)
        if nothing and self.new:
            with contextlib.suppress(OSError):  # somebody put something into it
                os.rmdir(self.out)

    def _path(self, name):
        return os.path.join(self.out, name)

    def _open_shard(self, stream):
        """The entry of the shard that a stream is writing; a new one after a complete one."""
        shards = self.shards[stream]
        if stream not in self.files:
            shards.append({"file": next(self.names[stream]), "tokens": 0, "documents": 0, "bytes": 0})
            self.files[stream] = open(self._path(shards[-1]["file"]) + ".partial", "wb")  # noqa: SIM115
        return shards[-1]

    def _complete(self, stream):
        """Give a stream's open file its final name and note its sha256."""
        with self.files.pop(stream) as file:
            file.flush()
            os.fsync(file.fileno())
        path = self._path(self.shards[stream][-1]["file"])
        os.replace(path + ".partial", path)
        sync_folder(self.out)
        self.shards[stream][-1]["sha256"] = sha256(path)

    def _measure(self, ids):
        """(documents that end in `ids`, bytes of text in them)."""
        text = ids[ids != self.tokenizer.eot]
        return len(ids) - len(text), len(self.tokenizer.decode_bytes(text.tolist()))


def check_finished(out: str, made: dict, tokenizer: dict) -> None:
    """Say that `out` is finished. Raises UserError when it has lost a file or was made in another way."""
    meta = read_json(os.path.join(out, "meta.json"))
    new = {"script": made["script"], "tokenizer": tokenizer} | made["arguments"]
    try:
        old = {"script": meta["made"]["script"], "tokenizer": meta["tokenizer"]} | meta["made"]["arguments"]
        sizes, said = file_sizes(meta), summary(meta["splits"])
    except (KeyError, TypeError):
        raise UserError(f"{out}/meta.json was not written by this script; choose another --out") from None
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            was = f"with {key} {old.get(key)!r}, not {new.get(key)!r}"
            was = "its input has changed" if key == "listing_sha256" else was
            raise UserError(f"{out} is finished, but {was}; choose another --out or delete it")
    for name, size in sizes.items():
        path = os.path.join(out, name)
        if not os.path.exists(path) or os.path.getsize(path) != size:
            raise UserError(f"{path} is missing or not as long as meta.json says; delete {out} and run again")
    clear(out, finished=True)  # a kill just before the end leaves a little
    print(f"{out} is already finished: {said}")


def file_sizes(meta: dict) -> dict[str, int]:
    """{file: bytes} of the bins that a meta.json lists."""
    shards = [shard for split in TRAIN_VAL for shard in meta["splits"][split]["shards"]]
    return {shard["file"]: shard["tokens"] * np.dtype(meta["dtype"]).itemsize for shard in shards}


def clear(out: str, finished: bool = False) -> None:
    """Remove what these scripts put into a folder, and nothing else; of a finished folder only what an
    unfinished one needs."""
    downloads, pattern = os.path.join(out, "download"), UNFINISHED if finished else OURS
    with contextlib.suppress(OSError):  # not there, or something else is in it
        for name in filter(DOWNLOADED.fullmatch, os.listdir(downloads)):
            os.unlink(os.path.join(downloads, name))
        os.rmdir(downloads)
    # progress.json is the last to go: while it is there, the next run knows the folder as ours.
    for name in sorted(os.listdir(out), key=lambda name: name == "progress.json"):
        if pattern.fullmatch(name):
            os.unlink(os.path.join(out, name))


def totals(shards: list[dict]) -> dict:
    """A split's entry in meta.json."""
    counts = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes")}
    return counts | {"shards": shards}


def summary(splits: dict) -> str:
    parts = (f"{name} {s['tokens']:,} tokens in {s['documents']:,} documents" for name, s in splits.items())
    return ", ".join(parts)
