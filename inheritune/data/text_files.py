"""What is in a file: plain text in pieces, tables row by row.

gzip, zstd and Parquet are recognised by their first bytes, whatever the file is called. A text whose first
line is a JSON object is a table.

pyarrow reads .parquet and .arrow and unpacks; its decompressors notice a file that was cut off. The standard
library reads JSON and CSV: pyarrow's readers refuse long rows and half surrogate pairs, and take a quotation
mark that is never closed for one long field.
"""

import codecs
import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow
from pyarrow import parquet

from inheritune.base.errors import UserError, first_line
from inheritune.data.tokenizer import last_cut

TEXT = (".txt", ".text", ".md", ".rst", ".tex", ".py")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
ARROW = (".parquet", ".arrow")  # compressed by the format itself
PACKED = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
MAGIC |= {bytes((0x50 + i, 0x2A, 0x4D, 0x18)): "zstd" for i in range(16)}  # zstd's skippable frames
BLANKS = codecs.BOM_UTF8 + b" \t\r\n"
POINTER = b"version https://git-lfs"  # how the pointer begins that Git LFS leaves in place of a large file
PIECE = 1 << 17  # characters of a text file held at a time
MAX_LINE = 1 << 26  # bytes of a first line that is tried as JSON
# from broken files (KeyError: two columns of one name)
READ_ERRORS = (OSError, ValueError, KeyError, RecursionError, csv.Error, pyarrow.ArrowException)
csv.field_size_limit(sys.maxsize)


class File(NamedTuple):
    path: str
    kind: str  # "text", or the suffix of a table
    packed: str | None  # its compression
    size: int  # in bytes
    sample: str  # sha256 of its first 64 KiB and, if it is longer, of 16 blocks of 4 KiB spread over it


class Piece(NamedTuple):
    """["a", "b…"] with end=False, then ["…b", "d"] with continues=True: 4 texts, which are 3 documents."""

    texts: list[str]  # documents; the first may be the rest of one, and the last may go on in the next piece
    continues: bool = False  # does the first text continue a document of the piece before?
    end: bool = True  # does the last text end its document? (all others do)
    progress: float | None = None  # the share of the input read so far, where it is known
    split: str = "train"


class NamedKind(NamedTuple):
    kind: str | None  # "text", or the suffix of a table; None: nothing that we read
    packed: str | None  # the compression


def named_kind(path: str) -> NamedKind:
    """What a name suggests: `"a.md.gz"` → `("text", "gzip")`, `"a.csv"` → `(".csv", None)`, `"a.pdf"` →
    `(None, None)`. A name without a suffix suggests text."""
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    packed = PACKED.get(suffix)
    suffix = os.path.splitext(stem)[1] if packed else suffix
    kind = "text" if suffix in (*TEXT, "") else suffix if suffix in TABLES else None
    return NamedKind(kind, packed)


def examine(path: str) -> File:
    """How a regular file is to be read. Raises UserError if it cannot be read."""
    kind, named = named_kind(path)
    with open(path, "rb") as f:
        size, head = os.fstat(f.fileno()).st_size, f.read(1 << 16)
        sample = hashlib.sha256(head)
        for i in range(16 if size > len(head) else 0):
            f.seek(size * i // 16)
            sample.update(f.read(4096))
    packed = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    if head.startswith(POINTER):
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` there")
    if named and not packed:
        raise UserError(f"{path} holds no {named}, though its name says so; fetch it again or rename it")
    if head.startswith(b"PAR1"):
        kind = ".parquet"
    if kind is None or (packed and kind in ARROW):
        kinds = ", ".join(TEXT + TABLES) + " are read, text, JSON and CSV also as .gz or .zst"
        raise UserError(f"{path}: only {kinds}; if it is plain text, rename it to .txt")
    if kind not in ARROW and not packed and head.count(0) > len(head) // 4:
        raise UserError(f"{path}: UTF-16 or no text at all; convert it first (iconv -f UTF-16 -t UTF-8)")
    file = File(path, kind, packed, size, sample.hexdigest())
    is_table = kind == "text" and (packed or head[:64].lstrip(BLANKS)[:1] == b"{") and begins_with_json(file)
    return file._replace(kind=".jsonl") if is_table else file


def begins_with_json(file: File) -> bool:
    """Whether the first line of a text file is a JSON object."""
    with contextlib.suppress(ValueError, RecursionError, OSError):  # a damaged file raises when it is read
        lines = io.BufferedReader(open_bytes(file)[1])
        if lines.peek(64).lstrip(BLANKS).startswith(b"{"):
            return isinstance(json.loads(lines.readline(MAX_LINE).decode("utf-8-sig")), dict)
    return False


def open_bytes(file: File) -> tuple:
    """(The raw file, the stream of its decompressed bytes)."""
    raw = pyarrow.OSFile(os.fsencode(file.path))
    return raw, pyarrow.CompressedInputStream(raw, file.packed) if file.packed else raw


def check_column(column: str, names: Iterable[str], where: str) -> None:
    if column not in names:
        names = ", ".join(map(str, names))
        raise UserError(
            f"{where}: no column {column!r} among {names}; choose with --text_column of prepare.py"
        )


def unreadable(path: str, where: str, error: Exception) -> UserError:
    """The error for a file that cannot be read past `where`."""
    cure = "repair the file, or fetch it again"
    if isinstance(error, UnicodeDecodeError):
        cure = "convert the file to UTF-8 first"
    elif "too much memory" in str(error):  # only zstd --long asks for more than 128 MiB
        cure = f"it was packed by zstd --long: unpack it with zstd -d --long=31 {path}"
    return UserError(f"{path}: cannot be read after {where} ({first_line(error)}); {cure}")


# Plain text


def read_blocks(file: File) -> Iterator[tuple[str, float]]:
    """Yield (PIECE characters, share of the file read by then) of a text file."""
    position = 0
    try:
        raw, stream = open_bytes(file)
        text = io.TextIOWrapper(io.BufferedReader(stream), "utf-8-sig", newline="")
        while block := text.read(PIECE):
            yield block, raw.tell() / (file.size or 1)
            position += len(block)
    except READ_ERRORS as e:
        raise unreadable(file.path, f"character {position:,}", e) from None


def pattern_of(split_on: str) -> re.Pattern:
    """The pattern that separates documents: `split_on` as it stands, with line ends LF or CRLF."""
    return re.compile("|".join(map(re.escape, (split_on, split_on.replace("\n", "\r\n")))))


def holds(file: File, split_on: str) -> bool:
    """Whether a text file contains `split_on`."""
    pattern, text = pattern_of(split_on), ""
    for block, _ in read_blocks(file):
        text = text[-2 * len(split_on) :] + block
        if pattern.search(text):
            return True
    return False


def read_text(file: File, split_on: str = "") -> Iterator[Piece]:
    """Yield the pieces of a text file.

    A long text is cut where that does not change its tokens, if there is such a place. With `split_on`, a
    document ends wherever that text stands; blanks at the end are no document.
    """
    pattern = pattern_of(split_on) if split_on else None
    text, continues = "", False
    for block, share in read_blocks(file):
        text += block
        if pattern:
            *documents, text = pattern.split(text)
            if documents := [d for i, d in enumerate(documents) if d or (continues and not i)]:
                yield Piece(documents, continues, True, share)
                continues = False
        end = len(text) - 2 * len(split_on)  # a separator, whose line ends may be CRLF, may begin after this
        if end >= PIECE // 2:
            used = last_cut(text, end)
            yield Piece([text[:used]], continues, False, share)
            text, continues = text[used:], True
    if text.strip() or continues or not split_on:
        yield Piece([text], continues, True, 1.0)


# Tables


def read_table(file: File, column: str) -> Iterator[Piece]:
    """Yield a piece for each row of a table; null in `column` is left out. Raises UserError for a row that is
    broken or holds something else than text there.

    Memory holds one row (.parquet: 256 rows; .arrow: a record batch; a JSON array: everything).
    """
    where, nulls = "its beginning", 0
    try:
        raw, stream = open_bytes(file)
        if file.kind in ARROW:
            rows = arrow_rows(raw, file, column)
        else:
            read = csv_rows if file.kind in (".csv", ".tsv") else json_rows
            rows = read(io.BufferedReader(stream, 1 << 20), file, column)
        for where, value in rows:
            if is_text(value, column, f"{file.path}, {where}"):
                yield Piece([value], progress=raw.tell() / (file.size or 1))
            else:
                nulls += 1
    except READ_ERRORS as e:
        raise unreadable(file.path, where, e) from None
    say_left_out(nulls, file.path)


def is_text(value, column: str, where: str) -> bool:
    """True for text, False for null, which many tables on the hub hold. Raises UserError for all else."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {column!r} holds a {type(value).__name__}, not text; remove the row")
    return value is not None


def say_left_out(nulls: int, where: str) -> None:
    if nulls:
        print(f"{where}: {nulls:,} rows left out, which hold null in place of text", file=sys.stderr)


def json_rows(lines: io.BufferedReader, file: File, column: str) -> Iterator[tuple]:
    """Yield (where it stands, what is in `column`) for JSON lines, or for the elements of one array."""
    if lines.peek(64).lstrip(BLANKS).startswith(b"["):
        rows = ((f"element {n}", row) for n, row in enumerate(json.loads(lines.read()), 1))
    else:
        rows = ((f"line {n}", json.loads(line)) for n, line in enumerate(lines, 1) if not line.isspace())
    for where, row in rows:
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise UserError(f"{file.path}, {where}: a JSON {kind}, not an object with the text")
        check_column(column, row, f"{file.path}, {where}")
        yield where, row[column]


def csv_rows(lines: io.BufferedReader, file: File, column: str) -> Iterator[tuple]:
    """The same for CSV. In .tsv a quotation mark is text."""
    content = io.TextIOWrapper(lines, "utf-8-sig", newline="")
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.kind == ".tsv" else {"strict": True}
    reader = csv.reader(content, **options)
    names = next(reader, [])
    check_column(column, names, f"{file.path}, line 1")
    place = names.index(column)
    for row in filter(None, reader):
        if len(row) != len(names):
            found = f"{len(row)} fields, but line 1 names {len(names)}"
            raise UserError(f"{file.path}, line {reader.line_num}: {found}; repair the row")
        yield f"line {reader.line_num}", row[place]


def arrow_rows(raw: pyarrow.OSFile, file: File, column: str) -> Iterator[tuple]:
    """The same for .parquet and .arrow. Binary columns are read as UTF-8."""
    if file.kind == ".parquet":
        # Buffered: otherwise a whole row group of the column, often a gigabyte, is read at once.
        table = parquet.ParquetFile(raw, buffer_size=1 << 20)
        names, groups = table.schema_arrow.names, range(table.num_row_groups)
        # One group at a time: asked for all at once, Arrow keeps the buffers of each until the last is read.
        options = {"columns": [column], "use_threads": False}
        batches = (batch for g in groups for batch in table.iter_batches(256, row_groups=[g], **options))
    elif raw.read(6) == b"ARROW1":  # Arrow's file format (Feather); `datasets` writes streams
        raw.seek(0)
        table = pyarrow.ipc.open_file(raw)
        names, batches = table.schema.names, map(table.get_batch, range(table.num_record_batches))
    else:
        raw.seek(0)
        batches = pyarrow.ipc.open_stream(raw)
        names = batches.schema.names
    check_column(column, names, file.path)
    values = itertools.chain.from_iterable(batch.column(column).to_pylist() for batch in batches)
    for n, value in enumerate(values, 1):
        yield f"row {n}", value.decode() if isinstance(value, bytes) else value
