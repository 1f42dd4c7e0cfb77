"""Sharing one preparation among n machines that know nothing of each other, and joining what they made.

Worker i of n prepares its part, a run of documents that starts where worker i - 1's ends, in a folder of its own
inside the data folder, as if it were all there is: it can be killed and started again like any other preparation,
and the workers come in any order. The join renames the parts' files into one numbered list and writes the meta.json
over all of them. No token is read for it; the parts' meta.json stay until the joined one is written, so a join that
was killed is continued by the same command.
"""

import argparse
import contextlib
import os
import re
from typing import NamedTuple

import numpy as np

from inheritune.base.errors import UserError
from inheritune.base.files import lock_folder, sync_folder
from inheritune.data.tokenizer import RANKS_FILE
from inheritune.data.writer import UNSET, check_finished, clear, read_finished, summary, totals, write_meta


class Worker(NamedTuple):
    """Worker number `i`, from 0, of `n`."""

    i: int
    n: int

    def __str__(self):
        return f"{self.i}/{self.n}"


def worker(text):
    """The `Worker` that a command line's I/N means."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, such as 0/8 for the first of eight")
    return Worker(int(match[1]), int(match[2]))


def add_sharing_flags(parser):
    """The flags of a script whose work can be shared."""
    help = "prepare part I (from 0) of N only; any machine, any order, all with the same other flags and --out"
    parser.add_argument("--worker", type=worker, metavar="I/N", help=help + UNSET)
    help = "make the folder of the parts that N workers have finished; goes with --out only"
    parser.add_argument("--join", type=int, metavar="N", help=help + UNSET)


def check_join_flags(parser, args):
    """Raise UserError for flags beside --join that it would not look at: the parts know what they were made with."""
    if args.join < 1:
        raise UserError(f"--join {args.join} must be at least 1, the number of workers")
    for name, value in vars(args).items():
        if name not in ("out", "join") and value != parser.get_default(name):
            raise UserError(f"--{name} does not go with --join, which takes --out only; the parts know the rest")


def share(n_documents, worker):
    """The numbers (a range) of the documents that are this worker's: shares differ by one document at most."""
    i, n = worker
    return range(n_documents * i // n, n_documents * (i + 1) // n)


def within(documents, number, pieces, at):
    """Those of the pieces from position `at` on that belong to `documents`, a range of their numbers. The first piece
    begins document `number`, or goes on with it. What share is done is counted in these documents."""
    pieces = pieces(at)
    while number < documents.stop and (piece := next(pieces, None)):
        number += piece.end
        yield piece._replace(done=(number - documents.start) / len(documents))


def part_folder(out, worker):
    return os.path.join(out, f"part_{worker.i}_of_{worker.n}")


def part_of(out, worker, arguments):
    """(Folder, arguments) of a worker's part, for `unfinished`; those of the whole when the parts are joined already.

    Raises UserError when `out` is being joined, or holds anything but the parts of as many workers.
    """
    if os.path.exists(os.path.join(out, "meta.json")):
        return out, arguments | {"workers": worker.n}
    if joining(out, worker.n):
        raise UserError(f"{out} is being joined; run --join {worker.n} to go on")
    return part_folder(out, worker), arguments | {"worker": str(worker)}


def joining(out, n):
    """Has a join of n parts begun in `out`? Raises UserError when there is anything but those parts and its files."""
    begun = False
    for name in sorted(os.listdir(out)) if os.path.isdir(out) else []:
        part = re.fullmatch(r"part_\d+_of_(\d+)", name)
        if part and int(part[1]) != n:
            raise UserError(f"{out} holds parts of {part[1]} workers, not {n}; go on with those or delete them")
        file = re.fullmatch(rf"(train|val)_\d{{6}}\.bin|{re.escape(RANKS_FILE)}", name)
        if not (part or file or name.startswith(".")):
            raise UserError(f"{out} holds {name}, which is no worker's; choose another --out")
        begun = begun or bool(file)
    return begun


def join(out, n, script):
    """Make the data folder `out` of the n finished parts in it, made by `script`; returns its meta.json as a dict.

    Raises UserError, with nothing changed, when a part is missing or unfinished, has lost a file, or was not made
    with the same tokenizer, arguments and versions as the others.
    """
    if not os.path.isdir(out):
        raise UserError(f"there is no folder {out} with parts to join")
    lock = lock_folder(out)
    if lock is None:
        raise UserError(f"{out} is being joined by another run; wait")
    try:
        if os.path.exists(os.path.join(out, "meta.json")):
            check_finished(out, read_finished(out)[1] | {"script": script, "workers": n})
        else:
            joining(out, n)  # begun or not: to refuse what does not belong here
            metas = read_parts(out, n, script)
            splits, files = joined(out, metas)
            move(files)
            sync_folder(out)
            made = metas[0]["made"]
            del made["arguments"]["worker"]
            made["arguments"]["workers"] = n
            write_meta(out, metas[0]["tokenizer"], metas[0]["dtype"], splits, made)
            print(f"{out}: {summary(splits)}")
        for i in range(n):
            folder = part_folder(out, Worker(i, n))
            if os.path.isdir(folder):
                clear(folder)
                with contextlib.suppress(OSError):  # something is in it that is not ours to delete
                    os.rmdir(folder)
        return read_finished(out)[0]
    finally:
        os.close(lock)


def read_parts(out, n, script):
    """The meta.json of each part, as dicts."""
    workers = [Worker(i, n) for i in range(n)]
    missing = [w for w in workers if not os.path.exists(os.path.join(part_folder(out, w), "meta.json"))]
    if missing:
        names = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
        raise UserError(f"{out} lacks {len(missing)} of {n} parts: run --worker {names} to the end first")
    metas, first = [], None
    for w in workers:
        folder = part_folder(out, w)
        lock = lock_folder(folder)
        if lock is None:
            raise UserError(f"{folder} is being written by another run; wait")
        os.close(lock)
        meta, made, _ = read_finished(folder)
        made["versions"] = meta["made"].get("versions")
        first = first or made | {"script": script}
        expected = first | {"worker": str(w)}
        for key in [*expected, *made]:
            if made.get(key) != expected.get(key):
                was = f"{key} {made.get(key)!r}, not {expected.get(key)!r}"
                raise UserError(f"{folder} was made with {was}; delete the wrong part and run its --worker again")
        metas.append(meta)
    return metas


def joined(out, metas):
    """(meta["splits"] of the whole, [(where a file of a part is, where it goes)]). Raises UserError for a file that
    is in neither place, or not as long as its part's meta.json says."""
    folders = [part_folder(out, Worker(i, len(metas))) for i in range(len(metas))]
    splits, files = {}, []
    for split in ("train", "val"):
        shards = []
        for folder, meta in zip(folders, metas, strict=True):
            for shard in meta["splits"][split]["shards"]:
                name = f"{split}_{len(shards):06d}.bin"
                # the bare name, so that a meta.json of somebody else's cannot have us move his choice of files
                here, there = os.path.join(folder, os.path.basename(shard["file"])), os.path.join(out, name)
                size = shard["tokens"] * np.dtype(meta["dtype"]).itemsize
                if not any(os.path.exists(path) and os.path.getsize(path) == size for path in (here, there)):
                    raise UserError(f"{here} is missing or not as long as it was; delete {folder} and make it again")
                files.append((here, there))
                shards.append(shard | {"file": name})
        splits[split] = totals(shards)
    if "sha256" in metas[0]["tokenizer"]:
        files.append((os.path.join(folders[0], RANKS_FILE), os.path.join(out, RANKS_FILE)))
    return splits, files


def move(files):
    """Rename each file that an earlier join, killed, has not renamed yet."""
    for here, there in files:
        if os.path.exists(here):
            os.replace(here, there)
