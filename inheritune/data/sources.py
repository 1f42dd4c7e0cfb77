"""Where text comes from: files read in constant memory, the Hugging Face hub, and the English in every Python.

A document is a whole text file, a line of a .jsonl[.gz|.zst] or a row of a .parquet or of a hub dataset. It reaches
the tokenizer as one or more `Piece`s. Each says where to go on after it, so an interrupted run need not start again.
"""

import ast
import codecs
import collections
import glob
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
import tokenize
import warnings
from typing import NamedTuple

from inheritune.base.errors import UserError

TEXT = (".txt", ".md", ".rst", ".tex", ".py")  # what a folder is searched for, besides TABLES
TABLES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
LITERAL = re.compile(r"\s*[\[(]?[-\"'\\\d]|\s*b[\"']")  # how a line of a table begins
PIECE = 1 << 17  # bytes of a text file held at a time


class File(NamedTuple):
    """The bytes `start` to `stop` of a text file, or a whole table."""

    path: str
    start: int
    stop: int


class Piece(NamedTuple):
    text: str
    end: bool  # does its document end with it?
    at: list  # [file number, item in it]: where reading goes on after this piece
    done: float | None  # the share of the input read so far, where it is known


# ------------------------------------------------------------------------------------------------------------
# Finding files


def find_files(paths):
    """The files that `paths` stand for, as a list of `File`.

    A file stands for itself, a folder for the text files and tables under it (sorted; names that start with a
    dot are left out), and anything else is tried as a glob pattern. Raises UserError where nothing is found.
    """
    found = []
    for path in paths:
        if os.path.isfile(path):
            names = [path]
        elif os.path.isdir(path):
            names = list(walk(path, TEXT + TABLES))
        else:
            names = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        if not names:
            what = "holds no " + ", ".join(TEXT + TABLES) if os.path.isdir(path) else "does not exist"
            raise UserError(f"{path} {what}; give text files, .jsonl[.gz|.zst], .parquet or folders of them")
        found += names
    if twice := [name for name, n in collections.Counter(found).items() if n > 1]:
        raise UserError(f"{twice[0]} is given twice; name each file once")
    return [File(name, 0, os.path.getsize(name)) for name in found]


def walk(folder, suffixes, skip=()):
    """Yield the paths of the files under `folder` whose names end in one of `suffixes`, always in one order."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in skip)
        for name in sorted(names):
            if name.endswith(suffixes) and not name.startswith("."):
                yield os.path.join(here, name)


def fingerprint(paths, files):
    """What tells this input from another, for meta.json: how it was named, its files' names and sizes."""
    listing = json.dumps([[file.path, file.stop - file.start] for file in files])
    return {
        "sources": list(paths),
        "files": len(files),
        "bytes": sum(file.stop - file.start for file in files),
        "listing_sha256": hashlib.sha256(listing.encode()).hexdigest(),
    }


# ------------------------------------------------------------------------------------------------------------
# Reading files


def read_files(files, column, at=(0, 0)):
    """Yield the `Piece`s of `files` in order, from position `at` on. `column` names the text in tables.

    Memory is one piece of a text file, one line of a .jsonl or 256 rows of a .parquet. Raises UserError naming
    file and place for anything broken: compressed data, JSON, UTF-8, a missing column, a value that is no text.
    """
    total = sum(file.stop - file.start for file in files) or 1
    before = 0
    for number, file in enumerate(files):
        size = file.stop - file.start
        if number >= at[0]:
            start = at[1] if number == at[0] else 0
            for text, end, item, read in reader(file.path)(file, column, start):
                # A finished text file is left behind; a table is left by reading on to its end.
                place = [number + 1, 0] if item is None else [number, item]
                yield Piece(text, end, place, (before + read * size) / total)
        before += size


def count_documents(files, column):
    """How many documents each file holds (a list), by the cheapest pass that can tell."""
    counts = []
    for file in files:
        if file.path.endswith(".parquet"):
            counts.append(open_parquet(file.path, column).metadata.num_rows)
        elif file.path.endswith(TABLES):
            counts.append(sum(1 for _ in lines(file.path)))
        else:
            counts.append(1)
    return counts


def place_of(document, counts):
    """The position, [file number, item in it], where document number `document` of files with so many begins."""
    for number, count in enumerate(counts):
        if document < count:
            return [number, document]
        document -= count
    return [len(counts), 0]


def check_tables(files, column):
    """Read one document of every table, so that a wrong column is reported before anything is written."""
    for file in files:
        if file.path.endswith(TABLES):
            next(reader(file.path)(file, column, 0), None)


def reader(path):
    """The generator function for a file of this name; it yields (text, ends, next item, share read)."""
    if path.endswith(".parquet"):
        return read_parquet
    return read_jsonl if path.endswith(TABLES) else read_text


def read_text(file, column, start):
    """The pieces of one text file; items are bytes from its start.

    A long file is cut where the tokens of the parts are the tokens of the whole: before a blank that follows a
    letter or digit, where all of tiktoken's vocabularies start a new word. A piece without any such place is
    cut at its end. Where a piece ends depends only on where it starts, so a second run cuts at the same places.
    """
    with open(file.path, "rb") as f:
        while True:
            offset = file.start + start
            f.seek(offset)
            block = f.read(min(PIECE, file.stop - offset))
            last = offset + len(block) == file.stop
            if not block and not last:
                raise UserError(f"{file.path} became shorter while it was read; run again")
            try:
                text, used = codecs.utf_8_decode(block, "strict", last)
            except UnicodeDecodeError as e:
                where = f"{file.path}, byte {offset + e.start}"
                raise UserError(f"{where}: not UTF-8; convert the file to UTF-8 first") from None
            if last:
                yield text, True, None, 1.0
                return
            if place := re.match(r"(?s).*[^\W_](?=[ \n])", text):
                text = place.group()
                used = len(text.encode())
            start += used
            yield text, False, start, start / (file.stop - file.start)


def lines(path, meter=None):
    """Yield (line number from 1, bytes) for the lines of a .jsonl[.gz|.zst] that are not blank.

    `meter`, a list of one number, is kept at the bytes of the (compressed) file read so far.
    """
    import pyarrow  # its decompressors, unlike zstandard's, notice a file that was cut short

    number = 0
    try:
        with pyarrow.OSFile(path) as raw:
            kind = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(path)[1])
            stream = pyarrow.CompressedInputStream(raw, kind) if kind else raw
            for number, line in enumerate(io.BufferedReader(stream, 1 << 20), 1):
                if meter is not None:
                    meter[0] = raw.tell()
                if not line.isspace():
                    yield number, line
    except OSError as e:
        raise UserError(f"{path}: cannot be read after line {number} ({e}); fetch it again") from None


def read_jsonl(file, column, start):
    """The documents of a .jsonl[.gz|.zst], one on each line that is not blank; items are documents."""
    meter = [0]
    for item, (number, line) in enumerate(lines(file.path, meter), 1):
        if item <= start:
            continue
        where = f"{file.path}, line {number}"
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as e:
            kind = "UTF-8" if isinstance(e, UnicodeDecodeError) else "JSON"
            raise UserError(f"{where}: not {kind} ({e}); repair or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: a JSON {type(row).__name__}; each line must be an object with the text")
        yield text_of(row, column, where), True, item, meter[0] / (file.stop or 1)


def text_of(row, column, where):
    """The text in a row (a dict). Raises UserError when the column is missing or holds something else."""
    if column not in row:
        raise UserError(f"{where}: no column {column!r} among {', '.join(row)}; choose with --text_column")
    if not isinstance(row[column], str):
        raise UserError(f"{where}: {column!r} holds a {type(row[column]).__name__}, not text")
    return row[column]


def open_parquet(path, column):
    """A pyarrow ParquetFile that has a text column called `column`."""
    import pyarrow
    from pyarrow import parquet

    try:
        # Buffered: otherwise a whole row group of the column, often a gigabyte, is read at once.
        table = parquet.ParquetFile(path, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: no parquet file or a damaged one ({first_line(e)}); fetch it again") from None
    names = table.schema_arrow.names
    if column not in names:
        raise UserError(f"{path}: no column {column!r} among {', '.join(names)}; choose with --text_column")
    kind = table.schema_arrow.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text; choose with --text_column")
    return table


def read_parquet(file, column, start):
    """The documents of a .parquet, one in each row; items are rows. Groups of rows before `start` are not read."""
    import pyarrow

    table = open_parquet(file.path, column)
    row = 0
    try:
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if row + rows <= start:
                row += rows
                continue
            # One group at a time: asked for all at once, Arrow keeps the buffers of each until the last is read.
            for batch in table.iter_batches(256, row_groups=[group], columns=[column], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    if row > start:
                        text = text_of({column: value.as_py()}, column, f"{file.path}, row {row}")
                        yield text, True, row, row / table.metadata.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        why = first_line(e)
        raise UserError(f"{file.path}: cannot be read after row {row} ({why}); fetch it again") from None


def first_line(error):
    return str(error).strip().split("\n")[0]


# ------------------------------------------------------------------------------------------------------------
# Reading from the Hugging Face hub


def load_hub(dataset, streaming, column, **which):
    """The `train` split of a hub dataset (or of a local folder in the hub's layout), its `column` alone.

    `which` goes to `datasets.load_dataset` (revision, name). Raises UserError, after the hub library's own 20
    seconds of trying again, when the hub cannot be reached, and when it refuses or there is no such column.
    """
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it would report every attempt
    print(f"asking the Hugging Face hub for {dataset} ...", file=sys.stderr)
    try:
        found = datasets.load_dataset(dataset, split="train", streaming=streaming, **which)
    except Exception as e:  # there is no common class, and every one of them means this
        raise UserError(
            f"{dataset} could not be loaded ({first_line(e)}); check the network, point HF_HOME at a filled cache, "
            "or give local files with --data_files"
        ) from e
    if found.column_names and column not in found.column_names:
        names = ", ".join(found.column_names)
        raise UserError(f"{dataset}: no column {column!r} among {names}; choose with --text_column")
    return found.select_columns([column])


def read_hub(dataset, column, n, at=(0, 0)):
    """Yield a `Piece` for each row of a hub dataset, mapped or streaming, from row `at[1]` on.

    `n` is how many rows there are, for the share that is done; None where nobody knows.
    """
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


# ------------------------------------------------------------------------------------------------------------
# The embedded corpus


def python_documentation():
    """[(name, text)] of the English that this Python carries: no network, and the same on every run.

    The topics of `pydoc`'s help, and for each module of the standard library (tests left out) its docstrings,
    each after the name it documents. A docstring that appeared before, or of less than 40 characters, is left out.
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

    Generated tables are left out too: the build's own variables (_sysconfigdata…), and files of whose lines more than
    half begin with a number or a string, as encodings' character maps do.
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
    for path in walk(folder, ".py", skip):
        yield os.path.relpath(path, folder)[: -len(".py")].replace(os.sep, ".").removesuffix(".__init__"), path


def by_hash(texts):
    """The texts of [(name, text)] in the order of their own hashes, so that the last tenth resembles the rest."""
    return sorted((text for _, text in texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def held_out(name):
    """Whether a document of this name is for validation: one name in ten, the same in every version of Python."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


def docstrings(path, name, seen):
    """Yield name and docstring of a module and all that it defines; `seen` is a set of docstrings to leave out."""
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
