"""Where text comes from: files, the Hugging Face hub, and the English in every Python.

A document is a text file (or a part of one, see --split_on), or a row of a table or of a hub dataset. It
reaches the tokenizer as one or more `Piece`s. Each says where to go on after it, so an interrupted run need
not start again.
"""

import ast
import collections
import contextlib
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
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import NamedTuple

from inheritune.base.errors import UserError
from inheritune.data.text_files import (
    TABLES,
    TEXT,
    File,
    check_column,
    first_line,
    is_known,
    is_text,
    open_parquet,
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


def add_shared_flags(parser: ArgumentParser) -> None:
    """The flags of all three commands."""
    parser.add_argument("--text_column", default="text", help="where a table keeps the text")
    help = "text that parts the documents of a text file, such as '<|endoftext|>'"
    parser.add_argument("--split_on", default="", metavar="TEXT", help=help + UNSET)
    parser.add_argument("--num_proc", type=int, default=os.cpu_count(), help="threads that tokenise")


def check_shared_flags(args: Namespace, paths: list[str] | None) -> None:
    if args.num_proc < 1:
        raise UserError(f"--num_proc {args.num_proc} must be at least 1")
    if args.split_on and not paths:
        raise UserError("--split_on parts the documents of text files: name some, or leave it out")
    for path in filter(os.path.isdir, paths or []):
        inside = os.path.realpath(path)
        if args.out and os.path.commonpath([inside, os.path.realpath(args.out)]) == inside:
            raise UserError(f"--out {args.out} lies in {path}, which is read: choose a folder outside of it")


def parse_corpus(parser: ArgumentParser, argv: list[str] | None, out: str, dataset: str) -> Namespace:
    """The arguments, checked, of a command that prepares a known corpus, from the hub or from files."""
    parser.add_argument("--out", default=out, help="folder to write")
    help = "hub dataset, or a local folder in the hub's layout"
    parser.add_argument("--dataset", default=dataset, help=help)
    parser.add_argument("--revision", default="main", help="its branch or commit")
    help = "a tiktoken name, bytes, or the path of a tokenizer.json or of a folder that holds one"
    parser.add_argument("--tokenizer", default="gpt2", help=help)
    help = "read these instead of the hub: .parquet, .jsonl[.gz|.zst], .txt, folders or glob patterns"
    parser.add_argument("--data_files", nargs="+", metavar="PATH", help=help + UNSET)
    add_shared_flags(parser)
    args = parser.parse_args(argv)
    check_shared_flags(args, args.data_files)
    return args


# Files


def open_files(paths: list[str], column: str, split_on: str) -> Source:
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
            names, what = known_files(path), "holds no " + ", ".join(TEXT + TABLES)
        elif os.path.lexists(path) and not os.path.isfile(path):
            what = "is a pipe or a device, which cannot be read twice"
            raise UserError(f"{path} {what}; save it to a file first")
        else:
            matches = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
            names, what = [name for name in matches if os.path.isfile(name)], "does not exist"
            if "**" not in path and (others := len(matches) - len(names)):
                print(f"{path}: {others} folders left out; name them to have their files", file=sys.stderr)
        if not names:
            raise UserError(f"{path} {what}; give text files, .jsonl[.gz|.zst], .parquet or folders of them")
        found += names
    if twice := [name for name, n in collections.Counter(map(os.path.abspath, found)).items() if n > 1]:
        raise UserError(f"{twice[0]} is given twice; name each file once")
    for name in found:
        check_known(name)
    return [File(name) for name in found]


def check_known(path: str) -> None:
    """Raise UserError unless files of this name are read."""
    if not is_known(path):
        kinds = ", ".join(TEXT + TABLES) + " are read, also as .gz or .zst"
        raise UserError(f"{path}: only {kinds}; if it is plain text, rename it to .txt")


def known_files(folder: str) -> list[str]:
    """The files under `folder` that are read; stderr says how many there are besides."""
    found, others = [], collections.Counter()
    for path in walk(folder):
        suffix = os.path.splitext(path)[1].lower()
        if suffix and is_known(path):
            found.append(path)
        else:
            others[suffix or "without a suffix"] += 1
    if others:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in sorted(others.items()))
        print(f"{folder}: {others.total()} files left out ({kinds})", file=sys.stderr)
    return found


def walk(folder: str, skip: tuple = ()) -> Iterator[str]:
    """Yield the paths of the files under `folder`, hidden ones left out, always in one order. Links to
    folders are followed, but none to where it was before."""
    seen = {os.path.realpath(folder)}

    def is_new(path):
        real = os.path.realpath(path)
        return not (real in seen or seen.add(real))

    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in skip)
        folders[:] = [f for f in folders if is_new(os.path.join(here, f))]
        yield from (os.path.join(here, name) for name in sorted(names) if not name.startswith("."))


def fingerprint(paths: list[str], files: list[File], split_on: str = "") -> dict:
    """What tells this input from another, for meta.json: how it was named, and its files' names, sizes, times
    of change and sampled content (16 blocks of 4 kB, evenly spaced over a file)."""
    listing, total = [], 0
    for file in files:
        stat, digest = os.stat(file.path), hashlib.sha256()
        with open(file.path, "rb") as f:
            for i in range(16):
                f.seek(stat.st_size * i // 16)
                digest.update(f.read(4096))
        listing.append([file.path, stat.st_size, stat.st_mtime_ns, digest.hexdigest()])
        total += stat.st_size
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    found = {"sources": list(paths), "files": len(files), "bytes": total, "listing_sha256": digest}
    return found | {"split_on": split_on} if split_on else found


def check_tables(files: list[File], column: str) -> None:
    """Read one document of every table, so that a wrong column is reported before anything is written."""
    for file in files:
        if not is_text(file.path):
            next(read_table(file.path, column, 0), None)


def count_documents(files: list[File], column: str, split_on: str = "") -> int:
    """How many documents there are, by the cheapest pass that can tell."""
    total = 0
    for file in files:
        if is_text(file.path):
            total += sum(ends for _, ends, *_ in read_text(file, 0, split_on)) if split_on else 1
        elif file.path.lower().endswith(".parquet"):
            total += open_parquet(file.path, column).metadata.num_rows
        else:
            total += sum(1 for _ in rows_of(file.path, column))
    return total


def read_files(files: list[File], column: str, split_on: str, at: list = (0, 0)) -> Iterator[Piece]:
    """Yield the `Piece`s of `files` in order, from position `at` on.

    `column` names the text in tables, `split_on` what parts the documents of a text file ("": nothing).
    Memory is one piece of a text file, one row of a table (256 of a .parquet) or a whole .json array. Raises
    UserError naming file and place for anything broken: compressed data, JSON, UTF-8, a missing column, a
    value that is no text.
    """
    sizes = [os.path.getsize(file.path) for file in files]
    for number in range(at[0], len(files)):
        file, start = files[number], at[1] if number == at[0] else 0
        before, total = sum(sizes[:number]), sum(sizes) or 1
        if is_text(file.path):
            pieces = read_text(file, start, split_on)
        else:
            pieces = read_table(file.path, column, start)
        for text, end, item, share in pieces:
            # A finished text file is left behind; a table is left by reading on to its end.
            place = [number + 1, 0] if item is None else [number, item]
            yield Piece(text, end, place, (before + share * sizes[number]) / total)


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
    if found.column_names:
        check_column(column, found.column_names, dataset)
    n = documents if streaming else len(found)
    pieces = functools.partial(read_hub, found.select_columns([column]), column, n)
    return Source({"dataset": dataset} | which, lambda: n, pieces)


def read_hub(dataset, column: str, n: float | None, at: list = (0, 0)) -> Iterator[Piece]:
    """Yield a `Piece` for each of about `n` rows of a hub dataset, mapped or streamed, from `at[1]` on."""
    row = at[1]
    rows = iter(dataset.skip(row))
    while True:
        try:
            found = next(rows, None)
        except Exception as e:
            raise UserError(f"reading from the hub failed ({first_line(e)}); run again to go on") from e
        if found is None:
            return
        row += 1
        text = text_of(found, column, f"row {row} of the dataset")
        yield Piece(text, True, [0, row], n and min(1.0, row / n))


# The embedded corpus


def python_documentation() -> list[tuple[str, str]]:
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
    for module, code in standard_library():
        if entries := list(docstrings(code, module, seen)):
            texts.append((module, "\n\n".join(entries) + "\n"))
    if not texts:
        raise UserError(f"this Python ({sys.executable}) came without its sources; give a PATH to text")
    return texts


def docstrings(code: str, name: str, seen: set[str]) -> Iterator[str]:
    """Yield name and docstring of a module and all that it defines, `seen` ones left out."""
    try:
        with warnings.catch_warnings(action="ignore"):  # old escapes in old modules
            todo = [(ast.parse(code), name)]
    except (SyntaxError, ValueError):  # a template
        return
    while todo:
        node, name = todo.pop(0)
        text = (ast.get_docstring(node) or "").strip()
        if len(text) >= 40 and text not in seen:
            seen.add(text)
            yield f"{name}\n\n{text}"
        defs = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        todo[:0] = [(child, f"{name}.{child.name}") for child in node.body if isinstance(child, defs)]


def python_sources() -> list[tuple[str, str]]:
    """[(module name, text)] of the standard library's own source files, tests left out.

    Generated tables are left out too: the build's own variables (_sysconfigdata…), and files of whose lines
    more than half begin with a number or a string, as encodings' character maps do.
    """
    texts = []
    for module, code in standard_library():
        lines = [line for line in code.splitlines() if line.strip()]
        literals = sum(LITERAL.match(line) is not None for line in lines)
        if lines and literals <= len(lines) / 2 and not module.startswith("_sysconfigdata"):
            texts.append((module, code))
    return texts


def standard_library() -> Iterator[tuple[str, str]]:
    """Yield (module name, text) of the standard library's files without its tests, always in one order."""
    folder = sysconfig.get_path("stdlib")
    skip = ("test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__")
    for path in walk(folder, skip):
        module, suffix = os.path.splitext(os.path.relpath(path, folder).replace(os.sep, "."))
        if suffix == ".py":
            # in the encoding that the file declares; templates are left out
            with contextlib.suppress(SyntaxError, UnicodeDecodeError), tokenize.open(path) as f:
                yield module.removesuffix(".__init__"), f.read()


def by_hash(documents: list[tuple[str, str]]) -> list[str]:
    """The texts of [(name, text)] in the order of their hashes, so that the last tenth resembles the rest."""
    return sorted((text for _, text in documents), key=lambda text: hashlib.sha256(text.encode()).digest())


def held_out(name: str) -> bool:
    """Whether a document of this name is for validation: one in ten, the same in every version of Python."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


def read_texts(texts: list[str], at: list = (0, 0)) -> Iterator[Piece]:
    """Yield a `Piece` for each of a list of documents, from number `at[1]` on."""
    for i in range(at[1], len(texts)):
        yield Piece(texts[i], True, [0, i + 1], (i + 1) / len(texts))
