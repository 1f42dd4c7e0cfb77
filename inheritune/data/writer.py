"""Writing a data folder, so that a kill costs a second of work (encode.py does the tokenising).

A data folder holds little-endian uint16 ids (uint32 where ids exceed 65,535) in train.bin and val.bin or in
numbered shards, and a meta.json that describes them. While it is made, the tokens go to NAME.partial, and every
second progress.json records how far the input was read and how long each file was then. A run that finds a
progress.json cuts the files back to those lengths and goes on from there, so the result is the same to the last
bit. meta.json is written last: a folder without it is unfinished.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time

import numpy as np
from tqdm import tqdm

from inheritune.base.errors import UserError
from inheritune.base.files import lock_folder, read_json, replacing, sha256, sync_folder, write_json
from inheritune.data.encode import batched, dtype_of, encode_in_order
from inheritune.data.tokenizer import RANKS_FILE

FORMAT = 1
RECORD_EVERY = 1.0  # seconds between two records of the progress
UNSET = "%(default).0s"  # in a help text that tells its default itself: keeps argparse from adding one


def add_shared_flags(parser):
    """The flags that all three scripts have."""
    parser.add_argument("--text_column", default="text", help="where a .jsonl or .parquet keeps the text")
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="processes that tokenise")


def check_shared_flags(args):
    if args.num_proc < 1:
        raise UserError(f"--num_proc {args.num_proc} must be at least 1")


@contextlib.contextmanager
def unfinished(out, script, arguments, tokenizer, at=(0, 0), documents=0):
    """Open the folder `out` for writing: a context that gives the progress (a dict) to go on from. A fresh one begins
    at position `at` of the input, where document number `documents` starts.

    It gives None when the folder is already finished with these arguments. A part that was made with others is
    thrown away. Raises UserError when the folder is finished with other arguments, not ours, or being written
    right now. If the run fails before anything was recorded, the folder is left as it was found.

    `arguments` is a dict of JSON values: all that decides the tokens, besides the tokenizer, and nothing else.
    """
    described = tokenizer.describe()
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "tiktoken": importlib.metadata.version("tiktoken"),
    }
    made = {"script": script, "arguments": arguments, "versions": versions}
    fresh = {"tokenizer": described, "made": made, "at": list(at), "documents": documents, "streams": {}}
    absent = []  # the folders that will be made, the innermost first
    folder = os.path.abspath(out)
    while not os.path.lexists(folder):
        absent.append(folder)
        folder = os.path.dirname(folder)
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"{out} is a file; --out names a folder")
    os.makedirs(out, exist_ok=True)
    lock = lock_folder(out)
    if lock is None:
        raise UserError(f"{out} is being written by another run; wait or choose another --out")
    try:
        if os.path.exists(os.path.join(out, "meta.json")):
            check_finished(out, {"script": script, "tokenizer": described} | arguments)
            yield None
            return
        progress_file = os.path.join(out, "progress.json")
        if os.path.exists(progress_file):
            progress = read_json(progress_file)
            if progress.get("made") != made or progress.get("tokenizer") != described:
                print(f"{out}: the unfinished part has other settings; starting afresh", file=sys.stderr)
                clear(out)
                progress = fresh
        elif any(not name.startswith(".") for name in os.listdir(out)):
            raise UserError(f"{out} is not empty and was not made by this script; choose another --out")
        else:
            progress = fresh
        write_json(progress_file, progress)
        try:
            yield progress
        except BaseException:
            downloads = os.path.join(out, "download")
            if progress["at"] == list(at) and not (os.path.isdir(downloads) and os.listdir(downloads)):
                clear(out)
                with contextlib.suppress(OSError):  # another worker's part may have come into the outer ones
                    for folder in absent:
                        os.rmdir(folder)
            raise
    finally:
        os.close(lock)


def read_finished(out):
    """Of a finished folder: (its meta.json as a dict; script, tokenizer and arguments in one dict; {file: bytes}).

    Raises UserError when its meta.json is not of our making.
    """
    meta = read_json(os.path.join(out, "meta.json"))
    try:
        made = {"script": meta["made"]["script"], "tokenizer": meta["tokenizer"]} | meta["made"]["arguments"]
        splits = [totals(meta["splits"][name]["shards"]) for name in ("train", "val")]
        item = np.dtype(meta["dtype"]).itemsize
        sizes = {shard["file"]: shard["tokens"] * item for split in splits for shard in split["shards"]}
    except (KeyError, TypeError):
        raise UserError(f"{out}/meta.json was not written by this script; choose another --out") from None
    return meta, made, sizes


def check_finished(out, new):
    """Say that `out` is finished. Raises UserError when it has lost a file, or its script, tokenizer and arguments
    are not `new`."""
    meta, old, sizes = read_finished(out)
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            was = f"{key} {old.get(key)!r}, not {new.get(key)!r}"
            raise UserError(f"{out} is finished, but with {was}; choose another --out or delete it")
    for name, size in sizes.items():
        path = os.path.join(out, name)
        if not os.path.exists(path) or os.path.getsize(path) != size:
            raise UserError(f"{path} is missing or not as long as meta.json says; delete {out} and run again")
    clear(out, keep=["meta.json", RANKS_FILE, *sizes])  # a kill just before the end leaves a little
    print(f"{out} is already finished: {summary(meta['splits'])}")


def clear(out, keep=()):
    """Remove what these scripts put into a folder, and nothing else."""
    ours = r"(train|val)(_\d{6})?\.bin(\.partial)?|\.?(meta\.json|progress\.json|tokenizer\.tiktoken)(\.tmp)?"
    shutil.rmtree(os.path.join(out, "download"), ignore_errors=True)
    # progress.json is the last to go: while it is there, the next run knows the folder as ours.
    for name in sorted(os.listdir(out), key=lambda name: name == "progress.json"):
        if re.fullmatch(ours, name) and name not in keep:
            os.unlink(os.path.join(out, name))


def summary(splits):
    parts = (f"{name} {s['tokens']:,} tokens in {s['documents']:,} documents" for name, s in splits.items())
    return ", ".join(parts)


class Stream:
    """One stream of tokens, written as one .bin file after the other.

    `names` gives the files' names in order; each file but the last holds exactly `shard_tokens` tokens. The file
    being written is called NAME.partial. `shards` is the record: a dict for each file, with a sha256 once it is
    finished.
    """

    def __init__(self, out, names, tokenizer, shard_tokens=sys.maxsize, max_tokens=sys.maxsize):
        self.out, self.names, self.tokenizer = out, iter(names), tokenizer
        self.shard_tokens, self.max_tokens = shard_tokens, max_tokens
        self.shards, self.tokens, self.file = [], 0, None

    def resume(self, shards):
        """Go on from a record: cut the unfinished file back to it, and forget what was written after it."""
        self.shards = shards
        self.tokens = sum(shard["tokens"] for shard in shards)
        for shard, name in zip(shards, self.names, strict=False):
            path = os.path.join(self.out, name)
            size = shard["tokens"] * dtype_of(self.tokenizer).itemsize
            partial = path + ".partial"
            if "sha256" in shard:
                intact = os.path.exists(path) and os.path.getsize(path) == size
            else:
                if os.path.exists(path):  # it was finished between the record and the kill
                    os.replace(path, partial)
                intact = os.path.exists(partial) and os.path.getsize(partial) >= size
            if not intact:
                raise UserError(f"{path} is missing or too short; delete {self.out} and run again")
            if "sha256" not in shard:
                os.truncate(partial, size)
                self.file = open(partial, "ab")  # noqa: SIM115 (closed by `close_shard`)

    def write(self, ids, documents, n_bytes):
        """Append `ids` (1-D, of `dtype_of`), which end `documents` documents and decode to `n_bytes` of text."""
        if len(ids) > self.max_tokens - self.tokens:
            ids = ids[: self.max_tokens - self.tokens]
            documents, n_bytes = self.measure(ids)
        while len(ids):
            if not self.shards or "sha256" in self.shards[-1]:
                self.shards.append({"file": next(self.names), "tokens": 0, "documents": 0, "bytes": 0})
                path = os.path.join(self.out, self.shards[-1]["file"])
                self.file = open(path + ".partial", "wb")  # noqa: SIM115
            shard = self.shards[-1]
            part, ids = np.split(ids, [self.shard_tokens - shard["tokens"]])
            part_documents, part_bytes = self.measure(part) if len(ids) else (documents, n_bytes)
            self.file.write(part.data)
            self.tokens += len(part)
            shard["tokens"] += len(part)
            shard["documents"] += part_documents
            shard["bytes"] += part_bytes
            documents, n_bytes = documents - part_documents, n_bytes - part_bytes
            if shard["tokens"] == self.shard_tokens:
                self.close_shard()

    def measure(self, ids):
        """(documents that end in `ids`, bytes of text in them)."""
        text = ids[ids != self.tokenizer.eot]
        return len(ids) - len(text), len(self.tokenizer.decode_bytes(text.tolist()))

    def sync(self):
        """See to it that everything written so far is on disk."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close_shard(self):
        """Finish the open file, if there is one, and give it its final name."""
        if self.file:
            self.sync()
            self.file.close()
            self.file = None
            path = os.path.join(self.out, self.shards[-1]["file"])
            os.replace(path + ".partial", path)
            sync_folder(self.out)
            self.shards[-1]["sha256"] = sha256(path)


def write_tokens(progress, streams, pieces, stream_of, num_proc, needed=("train", "val")):
    """Tokenise what `pieces` yields, write it to `streams`, and close the folder with its meta.json.

    `progress` comes from `unfinished` and says where to go on; `streams` is {name: Stream}; `pieces(at)` yields the
    `Piece`s from position `at` on; `stream_of(i)` names the stream of document number i. Returns
    the meta.json. Raises UserError, and leaves the folder unfinished, when one of the splits `needed` got no token.
    """
    stream = next(iter(streams.values()))
    out, tokenizer, max_tokens = stream.out, stream.tokenizer, stream.max_tokens
    for name, shards in progress["streams"].items():
        streams[name].resume(shards)
    start = sum(stream.tokens for stream in streams.values())
    if start:
        print(f"{out}: going on after {start:,} tokens", file=sys.stderr)

    def record():
        for stream in streams.values():
            stream.sync()
        progress["streams"] = {name: stream.shards for name, stream in streams.items()}
        write_json(os.path.join(out, "progress.json"), progress)

    batches = batched(pieces(progress["at"]), stream_of, progress["documents"])
    encoded = encode_in_order(batches, tokenizer, num_proc)
    bar = tqdm(initial=start, unit="tok", unit_scale=True, desc=out, dynamic_ncols=True)
    recorded = time.monotonic()
    with contextlib.closing(encoded), contextlib.closing(batches), bar:
        for (at, documents, done), tokens in encoded:
            for name, (ids, ended, n_bytes) in tokens.items():
                streams[name].write(np.frombuffer(ids, dtype_of(tokenizer)), ended, n_bytes)
            progress["at"], progress["documents"] = at, documents
            written = sum(stream.tokens for stream in streams.values())
            if done:  # by what the text so far came to; this is what the remaining time follows from
                bar.total = min(max_tokens, round(written / done))
            bar.update(written - bar.n)
            if written >= max_tokens:
                break
            if time.monotonic() - recorded >= RECORD_EVERY:
                record()
                recorded = time.monotonic()
    record()
    for stream in streams.values():
        stream.close_shard()
    record()
    return finish(out, progress, tokenizer, needed)


def finish(out, progress, tokenizer, needed):
    """Write meta.json, which makes the folder a finished one, and remove what only an unfinished one needs."""
    splits = {}
    for name in ("train", "val"):
        shards = [s for shards in progress["streams"].values() for s in shards if s["file"].startswith(name)]
        if name in needed and not shards:
            raise UserError(
                f"{out}: no text is left for {name}; give more text, or ask for smaller shards or fewer workers"
            )
        splits[name] = totals(shards)
    if tokenizer.path:
        with replacing(os.path.join(out, RANKS_FILE)) as f, open(tokenizer.path, "rb") as ranks:
            shutil.copyfileobj(ranks, f)
    meta = write_meta(out, progress["tokenizer"], dtype_of(tokenizer).name, splits, progress["made"])
    clear(out, keep=["meta.json", RANKS_FILE, *(s["file"] for name in splits for s in splits[name]["shards"])])
    print(f"{out}: {summary(splits)}")
    return meta


def totals(shards):
    """A split's entry in meta.json."""
    keys = ("tokens", "documents", "bytes")
    return {key: sum(shard[key] for shard in shards) for key in keys} | {"shards": shards}


def write_meta(out, tokenizer, dtype, splits, made):
    """Write meta.json and return it: `tokenizer` as it describes itself, the ids' `dtype` by name."""
    meta = {"format": FORMAT, "tokenizer": tokenizer, "dtype": dtype, "splits": splits, "made": made}
    write_json(os.path.join(out, "meta.json"), meta)
    return meta
