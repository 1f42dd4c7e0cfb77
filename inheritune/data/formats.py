"""Files of text, read in constant memory: plain text in pieces, tables (.jsonl, .json, .csv, .parquet) row by
row.

Every reader can begin after any item that it gave before. Whatever is broken in a file is one line that names
the file and the place.
"""

import codecs
import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow  # its decompressors, unlike zstandard's, notice a file that was cut short
from pyarrow import parquet

from inheritune.base.errors import UserError
from inheritune.data.tokenizer import CUT

TEXT = (".txt", ".text", ".md", ".rst", ".tex", ".py")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = {".gz": "gzip", ".zst": "zstd"}  # read as what the suffix before it says
PIECE = 1 << 17  # bytes of a text file held at a time
MAX_ARRAY = 1 << 30  # bytes of a JSON array, which is held whole
BOM = codecs.BOM_UTF8


class File(NamedTuple):
    """The bytes `start` to `stop` (None: to the end) of a text file's content, or a whole table."""

    path: str
    start: int = 0
    stop: int | None = None


def kind_of(path: str) -> tuple[str, str | None]:
    """(suffix: .txt for every plain text, else a table's or an unknown one; compression) that a file's name
    says."""
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    packed = PACKED.get(suffix)
    if packed:
        suffix = os.path.splitext(stem)[1]
    return (".txt" if suffix in (*TEXT, "") else suffix), packed


def is_text(path: str) -> bool:
    return kind_of(path)[0] == ".txt"


def is_known(path: str) -> bool:
    """Whether files of this name are read. (A .parquet has its own compression.)"""
    kind, packed = kind_of(path)
    return kind == ".txt" or (kind in TABLES and not (kind == ".parquet" and packed))


def open_bytes(path: str, start: int = 0):
    """(The raw file, the stream of its decompressed bytes from number `start` on), both with `read` and
    `tell`."""
    raw = pyarrow.OSFile(path)
    packed = kind_of(path)[1]
    if not packed:
        raw.seek(start)
        return raw, raw
    stream = pyarrow.CompressedInputStream(raw, packed)
    while start > 0 and (block := stream.read(min(start, 1 << 20))):
        start -= len(block)
    return raw, stream


def check_encoding(path: str, block: bytes) -> None:
    """Raise UserError for the first bytes of a file in UTF-16."""
    start = block[:1000]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start.count(0) > len(start) // 4:
        raise UserError(
            f"{path}: UTF-16 or no text at all, not UTF-8; convert it first (iconv -f UTF-16 -t UTF-8)"
        )


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


# Plain text


def read_text(file: File, start: int, split_on: str = "") -> Iterator[tuple]:
    """Yield (text, ends, next item or None, share read) for the pieces of a text file; items are bytes from
    its start.

    A long text is cut where the tokens of the parts are the tokens of the whole (tokenizer.CUT). A piece
    without any such place is cut at its end. Where a piece ends depends only on where it starts, so a second
    run cuts at the same places. With `split_on`, a document ends wherever that text stands; blanks after the
    last place are no document.
    """
    stop = sys.maxsize if file.stop is None else file.stop
    try:
        raw, stream = open_bytes(file.path, file.start + start)
        block = b""
        while True:
            # the bytes that begin here, and one more to see whether they are the last
            offset = file.start + start
            block += stream.read(min(PIECE + 1, stop - offset) - len(block))
            last = len(block) <= PIECE
            if last and file.stop is not None and offset + len(block) < stop:
                raise UserError(f"{file.path} became shorter while it was read; run again")
            if offset == 0:
                check_encoding(file.path, block)
            bom = len(BOM) if offset == 0 and block.startswith(BOM) else 0
            text = decode(block[bom:PIECE], last, file.path, offset + bom)

            # how much of them is this piece
            place = text.find(split_on) if split_on else -1
            if place < 0 and last:
                if text.strip() or not (split_on and start):
                    yield text, True, None, 1.0
                return
            if place >= 0:
                piece, used = text[:place], text[: place + len(split_on)]
            else:
                text = text[: len(text) - max(0, len(split_on) - 1)]  # the rest may begin a `split_on`
                found = CUT.match(text)
                piece = used = found.group() if found else text
            used = bom + len(used.encode())
            block = block[used:]
            start += used
            share = raw.tell() / raw.size() if file.stop is None else start / (stop - file.start)
            yield piece, place >= 0, start, share
    except OSError as e:
        raise UserError(f"{file.path}: cannot be read after byte {start} ({e}); fetch it again") from None


def decode(block: bytes, last: bool, path: str, offset: int) -> str:
    """The text of UTF-8 bytes; an incomplete character at their end is left out unless they are the last."""
    try:
        return codecs.utf_8_decode(block, "strict", last)[0]
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path}, byte {offset + e.start}: not UTF-8; convert the file to UTF-8 first"
        ) from None


def cut_in_two(file: File, val_fraction: float) -> list[File]:
    """A text file as two, the second of about `val_fraction` of its bytes, parted between characters."""
    size = file.stop
    if size is None:
        _, stream = open_bytes(file.path)
        size = sum(len(block) for block in iter(lambda: stream.read(1 << 20), b""))
    cut = round(size * (1 - val_fraction))
    _, stream = open_bytes(file.path, cut)
    while (stream.read(1) or b"a")[0] & 0xC0 == 0x80:  # in the middle of a character
        cut += 1
    if not 0 < cut < size:
        raise UserError(f"{file.path} is too short to part into training and validation; give more text")
    return [File(file.path, 0, cut), File(file.path, cut, size)]


# Tables


def read_table(path: str, column: str, start: int) -> Iterator[tuple]:
    """Yield (text, True, next item, share read) for the documents of a table; items are documents."""
    for item, (row, where, share) in enumerate(rows_of(path, column, start), 1):
        if item > start:
            yield text_of(row, column, where), True, item, share


def text_of(row: dict, column: str, where: str) -> str:
    """The text in a row. Raises UserError when the column is missing or holds something else."""
    if column not in row:
        names = ", ".join(map(str, row))
        raise UserError(f"{where}: no column {column!r} among {names}; choose with --text_column")
    if not isinstance(row[column], str):
        raise UserError(f"{where}: {column!r} holds a {type(row[column]).__name__}, not text")
    return row[column]


def rows_of(path: str, column: str, start: int) -> Iterator[tuple]:
    """Yield (row as a dict, where it stands, share read) for the rows of a table. The first `start` are only
    counted: for them, the row may be None."""
    kind = kind_of(path)[0]
    if kind == ".parquet":
        yield from parquet_rows(path, column, start)
        return
    number = 0
    try:
        raw, stream = open_bytes(path)
        lines = io.BufferedReader(stream, 1 << 20)
        begin = lines.peek(1000)
        check_encoding(path, begin)
        if begin.startswith(BOM):
            lines.read(len(BOM))
        if kind in (".csv", ".tsv"):
            rows = csv_rows(lines, "," if kind == ".csv" else "\t")
        elif kind == ".json" and begin.removeprefix(BOM).lstrip().startswith(b"["):
            rows = array_rows(lines, path)
        else:
            rows = json_rows(lines, path, start)
        for number, row in rows:
            yield row, f"{path}, line {number}", raw.tell() / (raw.size() or 1)
    except OSError as e:
        raise UserError(f"{path}: cannot be read after line {number} ({e}); fetch it again") from None
    except (UnicodeDecodeError, csv.Error) as e:
        kind = "UTF-8" if isinstance(e, UnicodeDecodeError) else "CSV"
        raise UserError(f"{path}, after line {number}: not {kind} ({e}); repair the file") from None


def json_rows(lines: io.BufferedReader, path: str, start: int) -> Iterator[tuple]:
    """(line number, object, or None for the first `start`) of the lines that are not blank."""
    item = 0
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            item += 1
            yield number, parse(line, f"{path}, line {number}", dict) if item > start else None


def array_rows(lines: io.BufferedReader, path: str) -> Iterator[tuple]:
    """(1, object) of the elements of a JSON array, which is read whole."""
    content = lines.read(MAX_ARRAY + 1)
    if len(content) > MAX_ARRAY:
        raise UserError(
            f"{path}: an array of over {MAX_ARRAY >> 30} GiB; write an object a line (.jsonl) instead"
        )
    for number, row in enumerate(parse(content, path, list), 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, element {number}: a JSON {type(row).__name__}, not an object with the text"
            )
        yield number, row


def parse(content: bytes, where: str, kind: type) -> dict | list:
    """A JSON value of one type. Raises UserError."""
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as e:
        what = "UTF-8" if isinstance(e, UnicodeDecodeError) else "JSON"
        raise UserError(f"{where}: not {what} ({e}); repair or remove the line") from None
    if not isinstance(value, kind):
        raise UserError(f"{where}: a JSON {type(value).__name__}; each line must be an object with the text")
    return value


def csv_rows(lines: io.BufferedReader, delimiter: str) -> Iterator[tuple]:
    """(number of its last line, row) of a table whose first row names the columns."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.TextIOWrapper(lines, "utf-8", newline=""), delimiter=delimiter)
    for row in reader:
        yield reader.line_num, row


def parquet_rows(path: str, column: str, start: int) -> Iterator[tuple]:
    """The rows of a .parquet, with `column` alone. Groups of rows before `start` are not read."""
    table = open_parquet(path, column)
    row, total = 0, table.metadata.num_rows
    try:
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if row + rows <= start:
                row += rows
                yield from ((None, path, 0) for _ in range(rows))
                continue
            # One group at a time: asked for all at once, Arrow keeps the buffers of each until the last is
            # read.
            for batch in table.iter_batches(256, row_groups=[group], columns=[column], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    yield {column: value.as_py()}, f"{path}, row {row}", row / total
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        why = first_line(e)
        raise UserError(f"{path}: cannot be read after row {row} ({why}); fetch it again") from None


def open_parquet(path: str, column: str):
    """A pyarrow ParquetFile that has a text column called `column`."""
    try:
        # Buffered: otherwise a whole row group of the column, often a gigabyte, is read at once.
        table = parquet.ParquetFile(path, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(
            f"{path}: no parquet file or a damaged one ({first_line(e)}); fetch it again"
        ) from None
    names = table.schema_arrow.names
    if column not in names:
        raise UserError(f"{path}: no column {column!r} among {', '.join(names)}; choose with --text_column")
    kind = table.schema_arrow.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text; choose with --text_column")
    return table
