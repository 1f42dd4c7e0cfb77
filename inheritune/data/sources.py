"""Where text comes from: files, the Hugging Face hub, and the English in every Python.

A document is a text file (or a part of one, see --split_on), or a row of a table or of a hub dataset. It
reaches the tokenizer as one or more `Piece`s. Each says where to go on after it, so an interrupted run need
not start again.
"""

import ast
import collections
import functools
import glob
import hashlib
import json
import os
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

from inheritune.base.errors import UserError
from inheritune.data.formats import (
    TABLES,
    TEXT,
    File,
    first_line,
    is_known,
    is_text,
    kind_of,
    read_table,
    read_text,
    rows_of,
    text_of,
)

LITERAL = re.compile(r"\s*[\[(]?[-\"'\\\d]|\s*b[\"']")  # how a line of a table in source code begins
UNSET = "%(default).0s"  # in a help text that tells its default itself: keeps argparse from adding one


class Piece(NamedTuple):
    text: str
    end: bool  # does its document end with it?
    at: list  # [file number, item in it]: where reading goes on after this piece
    done: float | None  # the share of the input read so far, where it is known


class Source(NamedTuple):
    """A corpus, opened."""

    arguments: dict  # what tells it from others, for meta.json
    documents: Callable[[], int]
    pieces: Callable[[list], Iterator[Piece]]  # from a position on


def add_shared_flags(parser) -> None:
    """The flags of all three commands."""
    parser.add_argument("--text_column", default="text", help="where a table keeps the text")
    help = "text that parts the documents of a text file, such as '<|endoftext|>'"
    parser.add_argument("--split_on", default="", metavar="TEXT", help=help + UNSET)
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="threads that tokenise")


def check_shared_flags(args) -> None:
    if args.num_proc < 1:
        raise UserError(f"--num_proc {args.num_proc} must be at least 1")
    if args.split_on and not (getattr(args, "sources", None) or getattr(args, "data_files", None)):
        raise UserError("--split_on parts the documents of text files: name some, or leave it out")


def add_corpus_flags(parser, out: str, dataset: str) -> None:
    """The flags of a command that prepares a known corpus, from the hub or from files."""
    parser.add_argument("--out", default=out, help="folder to write")
    parser.add_argument(
        "--dataset", default=dataset, help="hub dataset, or a local folder in the hub's layout"
    )
    parser.add_argument("--revision", default="main", help="its branch or commit")
    help = "a tiktoken name, bytes, or the path of a tokenizer.json or of a folder that holds one"
    parser.add_argument("--tokenizer", default="gpt2", help=help)
    help = "read these instead of the hub: .parquet, .jsonl[.gz|.zst], .txt, folders or glob patterns"
    parser.add_argument("--data_files", nargs="+", metavar="PATH", help=help + UNSET)
    add_shared_flags(parser)


# Files


def open_files(paths: list[str], column: str, split_on: str = "") -> Source:
    """Files, folders and patterns as a Source."""
    files = find_files(paths)
    check_tables(files, column)
    documents = functools.partial(count_documents, files, column, split_on)
    pieces = functools.partial(read_files, files, column, split_on)
    return Source(fingerprint(paths, files, split_on), documents, pieces)


def find_files(paths: list[str]) -> list[File]:
    """The files that `paths` stand for.

    A file stands for itself, a folder for the text files and tables under it (sorted; names that start with a
    dot are left out), and anything else is tried as a glob pattern. Raises UserError where nothing is found.
    """
    found = []
    for path in paths:
        if os.path.isdir(path):
            names = known_files(path)
        elif os.path.lexists(path) and not os.path.isfile(path):
            raise UserError(
                f"{path} is a pipe or a device, which cannot be read twice; save it to a file first"
            )
        else:
            names = (
                [path]
                if os.path.isfile(path)
                else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
            )
        if not names:
            what = "holds no " + ", ".join(TEXT + TABLES) if os.path.isdir(path) else "does not exist"
            raise UserError(f"{path} {what}; give text files, .jsonl[.gz|.zst], .parquet or folders of them")
        found += names
    if twice := [name for name, n in collections.Counter(found).items() if n > 1]:
        raise UserError(f"{twice[0]} is given twice; name each file once")
    for name in found:
        check_known(name)
    return [
        File(name, 0, os.path.getsize(name) if kind_of(name) == (".txt", None) else None) for name in found
    ]


def check_known(path: str) -> None:
    """Raise UserError unless files of this name are read."""
    if not is_known(path):
        kinds = ", ".join(TEXT + TABLES)
        raise UserError(
            f"{path}: only {kinds} are read, also as .gz or .zst; if it is plain text, rename it to .txt"
        )


def known_files(folder: str) -> list[str]:
    """The files under `folder` that are read; stderr says how many there are besides."""
    others = collections.Counter()
    found = []
    for path in walk(folder):
        suffix = os.path.splitext(path)[1].lower()
        if suffix and is_known(path):
            found.append(path)
        else:
            others[suffix or "without a suffix"] += 1
    if others:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in sorted(others.items()))
        print(f"{folder}: {sum(others.values())} files left out ({kinds})", file=sys.stderr)
    return found


def walk(folder: str, skip: tuple = ()) -> Iterator[str]:
    """Yield the paths of the files under `folder`, hidden ones left out, always in one order."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in skip)
        yield from (os.path.join(here, name) for name in sorted(names) if not name.startswith("."))


def fingerprint(paths: list[str], files: list[File], split_on: str = "") -> dict:
    """What tells this input from another, for meta.json: how it was named, and its files' names, sizes, times
    of change and sampled content."""
    listing, total = [], 0
    for path in (file.path for file in files):
        stat = os.stat(path)
        listing.append([path, stat.st_size, stat.st_mtime_ns, sampled(path, stat.st_size)])
        total += stat.st_size
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    found = {"sources": list(paths), "files": len(files), "bytes": total, "listing_sha256": digest}
    return found | {"split_on": split_on} if split_on else found


def sampled(path: str, size: int) -> str:
    """sha256 of 16 blocks of 4 kB, evenly spaced over a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for i in range(16):
            f.seek(size * i // 16)
            digest.update(f.read(4096))
    return digest.hexdigest()


def check_tables(files: list[File], column: str) -> None:
    """Read one document of every table, so that a wrong column is reported before anything is written."""
    for file in files:
        if not is_text(file.path):
            next(read_table(file.path, column, 0), None)


def count_documents(files: list[File], column: str, split_on: str = "") -> int:
    """How many documents there are, by the cheapest pass that can tell."""
    total = 0
    for file in files:
        if not is_text(file.path):
            total += sum(1 for _ in rows_of(file.path, column, sys.maxsize))
        elif split_on:
            total += sum(end for _, end, _, _ in read_text(file, 0, split_on))
        else:
            total += 1
    return total


def read_files(files: list[File], column: str, split_on: str, at: list = (0, 0)) -> Iterator[Piece]:
    """Yield the `Piece`s of `files` in order, from position `at` on.

    `column` names the text in tables, `split_on` what parts the documents of a text file ("": nothing).
    Memory is one piece of a text file, one row of a table (256 of a .parquet) or a whole .json array. Raises
    UserError naming file and place for anything broken: compressed data, JSON, UTF-8, a missing column, a
    value that is no text.
    """
    sizes = [os.path.getsize(file.path) if file.stop is None else file.stop - file.start for file in files]
    total, before = sum(sizes) or 1, 0
    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        if number >= at[0]:
            start = at[1] if number == at[0] else 0
            if is_text(file.path):
                pieces = read_text(file, start, split_on)
            else:
                pieces = read_table(file.path, column, start)
            for text, end, item, share in pieces:
                # A finished text file is left behind; a table is left by reading on to its end.
                place = [number + 1, 0] if item is None else [number, item]
                yield Piece(text, end, place, (before + share * size) / total)
        before += size


# The Hugging Face hub


def open_hub(dataset: str, streaming: bool, column: str, documents: float | None = None, **which) -> Source:
    """The `train` split of a hub dataset (or of a local folder in the hub's layout) as a Source.

    `which` goes to `datasets.load_dataset` (revision, name); `documents` is how many there are about, for a
    streamed one. Raises UserError, after the hub library's own 20 seconds of trying again, when the hub
    cannot be reached, and when it refuses or there is no such column.
    """
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it would report every attempt
    print(f"asking the Hugging Face hub for {dataset} ...", file=sys.stderr)
    try:
        found = datasets.load_dataset(dataset, split="train", streaming=streaming, **which)
    except Exception as e:  # there is no common class, and every one of them means this
        raise UserError(
            f"{dataset} could not be loaded ({first_line(e)}); check the network, point HF_HOME at a filled "
            "cache, or give local files with --data_files"
        ) from e
    if found.column_names and column not in found.column_names:
        names = ", ".join(found.column_names)
        raise UserError(f"{dataset}: no column {column!r} among {names}; choose with --text_column")
    n = documents if streaming else len(found)
    pieces = functools.partial(read_hub, found.select_columns([column]), column, n)
    return Source({"dataset": dataset} | which, lambda: n, pieces)


def read_hub(dataset, column: str, n: float | None, at: list = (0, 0)) -> Iterator[Piece]:
    """Yield a `Piece` for each row of a hub dataset, mapped or streaming, from row `at[1]` on; there are
    about `n`."""
    row = at[1]
    batches = dataset.skip(row).iter(256)
    while True:
        try:
            batch = next(batches, None)
        except Exception as e:
            raise UserError(f"reading from the hub failed ({first_line(e)}); run again to go on") from e
        if batch is None:
            return
        for text in batch[column]:
            row += 1
            text = text_of({column: text}, column, f"row {row} of the dataset")
            yield Piece(text, True, [0, row], n and min(1.0, row / n))


# The embedded corpus


def python_documentation():
    """[(name, text)] of the English that this Python carries: no network, and the same on every run.

    The topics of `pydoc`'s help, and for each module of the standard library (tests left out) its docstrings,
    each after the name it documents. A docstring that appeared before, or of less than 40 characters, is left
    out.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions split it off
        topics = {}
    texts = [(f"help on {topic}", text) for topic, text in sorted(topics.items())]

    seen = set()
    for module, path in standard_library():
        if entries := list(docstrings(path, module, seen)):
            texts.append((module, "\n\n".join(entries) + "\n"))
    if not texts:
        raise UserError(f"this Python ({sys.executable}) came without its sources; give a PATH to text")
    return texts


def python_sources():
    """[(module name, text)] of the standard library's own source files, tests left out.

    Generated tables are left out too: the build's own variables (_sysconfigdata…), and files of whose lines
    more than half begin with a number or a string, as encodings' character maps do.
    """
    texts = []
    for module, path in standard_library():
        try:
            with tokenize.open(path) as f:  # in the encoding that the file declares
                text = f.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        lines = [line for line in text.splitlines() if line.strip()]
        literals = sum(LITERAL.match(line) is not None for line in lines)
        if lines and literals <= len(lines) / 2 and not module.startswith("_sysconfigdata"):
            texts.append((module, text))
    return texts


def standard_library():
    """Yield (module name, path) of the standard library's files without its tests, always in one order."""
    folder = sysconfig.get_path("stdlib")
    skip = ("test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__")
    for path in walk(folder, skip):
        if path.endswith(".py"):
            yield (
                os.path.relpath(path, folder)[: -len(".py")].replace(os.sep, ".").removesuffix(".__init__"),
                path,
            )


def by_hash(texts):
    """The texts of [(name, text)] in the order of their own hashes, so that the last tenth resembles the
    rest."""
    return sorted((text for _, text in texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def held_out(name):
    """Whether a document of this name is for validation: one name in ten, the same in every version of
    Python."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


def docstrings(path, name, seen):
    """Yield name and docstring of a module and all that it defines; `seen` is a set of docstrings to leave
    out."""
    with open(path, "rb") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in old modules
        try:
            tree = ast.parse(f.read())
        except (SyntaxError, ValueError):  # a template, or another encoding
            return
    todo = [(tree, name)]
    while todo:
        node, name = todo.pop(0)
        text = (ast.get_docstring(node) or "").strip()
        if len(text) >= 40 and text not in seen:
            seen.add(text)
            yield f"{name}\n\n{text}"
        defs = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        todo[:0] = [(child, f"{name}.{child.name}") for child in node.body if isinstance(child, defs)]


def read_texts(texts, at=(0, 0)):
    """Yield a `Piece` for each of a list of documents, from number `at[1]` on."""
    for i in range(at[1], len(texts)):
        yield Piece(texts[i], True, [0, i + 1], (i + 1) / len(texts))
