"""What is in a file: plain text in pieces, tables row by row, both in constant memory.

Content decides how a file is read, its name only suggests. gzip, zstd and Parquet begin with bytes of their
own, and a text whose first line is a JSON object is a table. Whatever is broken is one line that names the
file and the place.

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
from inheritune.data.tokenizer import CUT

TEXT = (".txt", ".text", ".md", ".rst", ".tex", ".py")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
ARROW = (".parquet", ".arrow")  # packed inside
PACKED = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
BLANKS = codecs.BOM_UTF8 + b" \t\r\n"
POINTER = b"version https://git-lfs"  # how the stand-in begins that Git LFS leaves for a large file
PIECE = 1 << 17  # bytes of a text file held at a time
MAX_LINE = 1 << 26  # bytes of a first line that is tried as JSON
MAX_ARRAY = 1 << 30  # bytes of a JSON array, which is held whole
csv.field_size_limit(sys.maxsize)


class File(NamedTuple):
    path: str
    kind: str  # "text", or the suffix of a table
    packed: str | None  # its compression
    size: int  # in bytes
    sample: str  # sha256 of 16 blocks of 4 kB, evenly spaced over it; of all of a small one


def named_kind(path: str) -> tuple[str | None, str | None]:
    """What a name suggests: `"a.md.gz"` → `("text", "gzip")`, `"a.csv"` → `(".csv", None)`, `"a.pdf"` →
    `(None, None)`. A name without a suffix suggests text."""
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    packed = PACKED.get(suffix)
    suffix = os.path.splitext(stem)[1] if packed else suffix
    return ("text" if suffix in (*TEXT, "") else suffix if suffix in TABLES else None), packed


def examine(path: str) -> File:
    """How a regular file is to be read. Raises UserError where it is none that we read."""
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
    file = File(path, kind, packed, size, sample.hexdigest())
    is_table = kind == "text" and (packed or head[:64].lstrip(BLANKS)[:1] == b"{") and begins_with_json(file)
    return file._replace(kind=".jsonl") if is_table else file


def begins_with_json(file: File) -> bool:
    """Whether the first line of a text file is a JSON object."""
    with contextlib.suppress(ValueError, RecursionError, OSError):  # damaged files are told of when read
        lines = io.BufferedReader(open_bytes(file)[1])
        if lines.peek(64).lstrip(BLANKS).startswith(b"{"):
            return isinstance(json.loads(lines.readline(MAX_LINE).decode("utf-8-sig")), dict)
    return False


def open_bytes(file: File) -> tuple:
    """(The raw file, the stream of its decompressed bytes)."""
    raw = pyarrow.OSFile(os.fsencode(file.path))
    return raw, pyarrow.CompressedInputStream(raw, file.packed) if file.packed else raw


def check_encoding(path: str, block: bytes) -> None:
    """Raise UserError for the first bytes of a file in UTF-16."""
    begin = block[:1000]
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or begin.count(0) > len(begin) // 4:
        cure = "convert it first (iconv -f UTF-16 -t UTF-8)"
        raise UserError(f"{path}: UTF-16 or no text at all, not UTF-8; {cure}")


def check_column(column: str, names: Iterable[str], where: str) -> None:
    if column not in names:
        names = ", ".join(map(str, names))
        raise UserError(f"{where}: no column {column!r} among {names}; choose with --text_column")


def unreadable(path: str, where: str, error: Exception) -> UserError:
    """What to say of a file that cannot be read beyond a place: most were cut off."""
    why, cure = first_line(error), "fetch it again"
    if "too much memory" in why:  # only zstd --long asks for more than 128 MiB
        cure = f"it was packed by zstd --long: unpack it with zstd -d --long=31 {path}"
    return UserError(f"{path}: cannot be read after {where} ({why}); {cure}")


# Plain text


def read_blocks(file: File) -> Iterator[tuple[str, float]]:
    """Yield (text, share of the file read by then) of a text file, a PIECE at a time."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        raw, stream = open_bytes(file)
        while True:
            block = stream.read(PIECE)
            if position == 0:
                check_encoding(file.path, block)
                block = block.removeprefix(codecs.BOM_UTF8)
            pending = len(decoder.getstate()[0])
            yield decoder.decode(block, final=not block), raw.tell() / (file.size or 1)
            position += len(block)
            if not block:
                return
    except UnicodeDecodeError as e:
        where = f"{file.path}, byte {position - pending + e.start}"
        raise UserError(f"{where}: not UTF-8; convert the file to UTF-8 first") from None
    except OSError as e:
        raise unreadable(file.path, f"byte {position}", e) from None


def pattern_of(split_on: str) -> re.Pattern:
    """The pattern that parts documents: `split_on` as it stands, where a line may end in LF or CRLF."""
    return re.compile(re.escape(split_on).replace("\\\n", "\r?\n"))


def holds(file: File, split_on: str) -> bool:
    """Whether a text file has a place at which `split_on` parts documents."""
    pattern, text = pattern_of(split_on), ""
    for block, _ in read_blocks(file):
        text = text[-2 * len(split_on) :] + block
        if pattern.search(text):
            return True
    return False


def read_text(file: File, split_on: str = "") -> Iterator[tuple[str, bool, float]]:
    """Yield (text, whether its document ends with it, share read) for the pieces of a text file.

    A long text is cut at tokenizer.CUT, where cutting does not change the tokens, if there is such a place.
    With `split_on`, a document ends wherever that text stands; blanks at the end are no document.
    """
    pattern = pattern_of(split_on) if split_on else None
    text, inside = "", False  # inside: a part of this document was given out before
    for block, share in read_blocks(file):
        text += block
        if pattern:
            *documents, text = pattern.split(text)
            for document in documents:
                yield document, True, share
            inside = inside and not documents
        end = len(text) - 2 * len(split_on)  # what follows may begin a `split_on`
        if end >= PIECE // 2:
            place = CUT.match(text, 0, end)
            used = place.end() if place else end
            yield text[:used], False, share
            text, inside = text[used:], True
    if text.strip() or inside or not split_on:
        yield text, True, 1.0


# Tables


def read_table(file: File, column: str) -> Iterator[tuple[str, bool, float]]:
    """Yield (text, True, share read) for the rows of a table, in memory of one row (256 of a .parquet) or of
    a whole JSON array. Raises UserError for a row that is broken or holds no text in `column`."""
    where = "its beginning"
    try:
        raw, stream = open_bytes(file)
        if file.kind in ARROW:
            rows = arrow_rows(raw, file, column)
        else:
            lines = io.BufferedReader(stream, 1 << 20)
            check_encoding(file.path, lines.peek(1000))
            rows = (csv_rows if file.kind in (".csv", ".tsv") else json_rows)(lines, file, column)
        for where, value in rows:
            if not isinstance(value, str):
                kind = type(value).__name__
                raise UserError(f"{file.path}, {where}: {column!r} holds a {kind}, not text; remove the row")
            yield value, True, raw.tell() / (file.size or 1)
    except (UnicodeDecodeError, csv.Error) as e:
        kind = "UTF-8" if isinstance(e, UnicodeDecodeError) else "CSV"
        raise UserError(f"{file.path}, after {where}: not {kind} ({e}); repair the file") from None
    except (pyarrow.ArrowException, OSError) as e:
        raise unreadable(file.path, where, e) from None


def json_rows(lines: io.BufferedReader, file: File, column: str) -> Iterator[tuple]:
    """Yield (where it stands, what is in `column`) for JSON lines, or for the elements of one array."""
    if lines.peek(64).lstrip(BLANKS).startswith(b"["):
        content = lines.read(MAX_ARRAY + 1)
        if len(content) > MAX_ARRAY:
            size = f"{MAX_ARRAY >> 30} GiB"
            raise UserError(f"{file.path}: an array of over {size}; write an object a line (.jsonl) instead")
        rows = ((f"element {n}", row) for n, row in enumerate(parse_json(content, file.path), 1))
    else:
        numbered = ((f"line {n}", line) for n, line in enumerate(lines, 1) if not line.isspace())
        rows = ((where, parse_json(line, f"{file.path}, {where}")) for where, line in numbered)
    for where, row in rows:
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise UserError(f"{file.path}, {where}: a JSON {kind}, not an object with the text")
        check_column(column, row, f"{file.path}, {where}")
        yield where, row[column]


def parse_json(content: bytes, where: str) -> dict | list:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        what = "UTF-8" if isinstance(e, UnicodeDecodeError) else "JSON"
        raise UserError(f"{where}: not {what} ({e}); repair or remove the line") from None


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
    else:
        batches = pyarrow.ipc.open_stream(raw)
        names = batches.schema.names
    check_column(column, names, file.path)
    values = itertools.chain.from_iterable(batch.column(column).to_pylist() for batch in batches)
    for n, value in enumerate(values, 1):
        yield f"row {n}", value.decode() if isinstance(value, bytes) else value
