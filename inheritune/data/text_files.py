"""Files of text in constant memory: plain text in pieces, tables (.jsonl, .json, .csv, .parquet) row by row.

Every reader can begin after any item that it gave before. Whatever is broken in a file is one line that
names the file and the place.
"""

import codecs
import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
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
csv.field_size_limit(sys.maxsize)


class File(NamedTuple):
    """The bytes `start` to `stop` of a text file's content, or a whole table."""

    path: str
    start: int = 0
    stop: int = sys.maxsize


def kind_of(path: str) -> tuple[str, str | None]:
    """What a file's name says: (".txt" for all plain text, or the suffix of a table or of what is not read,
    compression)."""
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


def open_bytes(path: str, start: int = 0) -> tuple:
    """(The raw file, the stream of its decompressed bytes from number `start` on)."""
    raw = pyarrow.OSFile(os.fsencode(path))
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
        cure = "convert it first (iconv -f UTF-16 -t UTF-8)"
        raise UserError(f"{path}: UTF-16 or no text at all, not UTF-8; {cure}")


def check_column(column: str, names: Iterable[str], where: str) -> None:
    if column not in names:
        names = ", ".join(map(str, names))
        raise UserError(f"{where}: no column {column!r} among {names}; choose with --text_column")


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


# Plain text


def read_text(file: File, start: int, split_on: str = "") -> Iterator[tuple]:
    """Yield (text, ends, next item or None, share read) for the pieces of a text file; items are its bytes.

    A long text is cut where the tokens of the parts are the tokens of the whole (tokenizer.CUT), or at the
    end of a piece without any such place. Where a piece ends depends only on where it starts, so a second run
    cuts at the same places. With `split_on`, a document ends wherever that text stands; blanks after the last
    place are no document.
    """
    start, marker = max(start, file.start), split_on.encode()
    try:
        begun = max(file.start, start - len(marker))
        raw, stream = open_bytes(file.path, begun)
        inside = stream.read(start - begun) not in (b"", marker)  # the middle of a document
        block = b""
        while True:
            # the bytes that begin here, and one more to see whether they are the last
            block += stream.read(min(PIECE + 1, file.stop - start) - len(block))
            last = len(block) <= PIECE
            if start == 0:
                check_encoding(file.path, block)
            text = codecs.utf_8_decode(block[:PIECE], "strict", last)[0]

            # how much of them is this piece
            bom = start == 0 and text.startswith("\ufeff")  # 0 or 1 characters to leave out
            place = text.find(split_on) if split_on else -1
            if place >= 0:
                piece, used = text[bom:place], text[: place + len(split_on)]
            elif last:
                if text.strip() or inside or not split_on:
                    yield text[bom:], True, None, 1.0
                return
            else:
                end = len(text) - max(0, len(split_on) - 1)  # the rest may begin a `split_on`
                found = CUT.match(text, 0, end)
                used = found.group() if found else text[:end]
                piece = used[bom:]
            size, inside = len(used.encode()), place < 0
            start, block = start + size, block[size:]
            yield piece, not inside, start, raw.tell() / raw.size()
    except UnicodeDecodeError as e:
        where = f"{file.path}, byte {start + e.start}"
        raise UserError(f"{where}: not UTF-8; convert the file to UTF-8 first") from None
    except OSError as e:
        raise UserError(f"{file.path}: cannot be read after byte {start} ({e}); fetch it again") from None


def cut_in_two(path: str, val_fraction: float) -> list[File]:
    """A text file as two, the second of about `val_fraction` of its bytes, parted between characters."""
    _, stream = open_bytes(path)
    size = sum(len(block) for block in iter(lambda: stream.read(1 << 20), b""))
    cut = round(size * (1 - val_fraction))
    _, stream = open_bytes(path, cut)
    while (stream.read(1) or b"a")[0] & 0xC0 == 0x80:  # in the middle of a character
        cut += 1
    if not 0 < cut < size:
        raise UserError(f"{path} is too short to part into training and validation; give more text")
    return [File(path, 0, cut), File(path, cut)]


# Tables


def read_table(path: str, column: str, start: int) -> Iterator[tuple]:
    """Yield (text, True, next item, share read) for the documents of a table; items are documents."""
    rows = itertools.islice(rows_of(path, column), start, None)
    for item, (row, where, share) in enumerate(rows, start + 1):
        yield text_of(row, column, where), True, item, share


def text_of(row: dict, column: str, where: str) -> str:
    """The text in a row. Raises UserError when it has no such column, or something else there."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object with the text")
    check_column(column, row, where)
    if not isinstance(row[column], str):
        raise UserError(f"{where}: {column!r} holds a {type(row[column]).__name__}, not text")
    return row[column]


def rows_of(path: str, column: str) -> Iterator[tuple]:
    """Yield (row, where it stands, share read) for the rows of a table."""
    kind = kind_of(path)[0]
    if kind == ".parquet":
        yield from parquet_rows(path, column)
        return
    number, unit = 0, "line"
    try:
        raw, stream = open_bytes(path)
        lines = io.BufferedReader(stream, 1 << 20)
        begin = lines.peek(1000)
        check_encoding(path, begin)
        if kind in (".csv", ".tsv"):
            content = io.TextIOWrapper(lines, "utf-8-sig", newline="")
            reader = csv.DictReader(content, delimiter="," if kind == ".csv" else "\t", strict=True)
            rows = ((reader.line_num, row) for row in reader)
        elif kind == ".json" and begin.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            rows, unit = enumerate(read_array(lines, path), 1), "element"
        else:
            numbered = ((n, line) for n, line in enumerate(lines, 1) if not line.isspace())
            rows = ((n, parse(line, f"{path}, line {n}")) for n, line in numbered)
        for number, row in rows:
            yield row, f"{path}, {unit} {number}", raw.tell() / raw.size()
    except OSError as e:
        raise UserError(f"{path}: cannot be read after line {number} ({e}); fetch it again") from None
    except (UnicodeDecodeError, csv.Error) as e:
        kind = "UTF-8" if isinstance(e, UnicodeDecodeError) else "CSV"
        raise UserError(f"{path}, after line {number}: not {kind} ({e}); repair the file") from None


def read_array(lines: io.BufferedReader, path: str) -> list:
    content = lines.read(MAX_ARRAY + 1)
    if len(content) > MAX_ARRAY:
        size = f"{MAX_ARRAY >> 30} GiB"
        raise UserError(f"{path}: an array of over {size}; write an object a line (.jsonl) instead")
    return parse(content, path)


def parse(content: bytes, where: str) -> dict | list:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        what = "UTF-8" if isinstance(e, UnicodeDecodeError) else "JSON"
        raise UserError(f"{where}: not {what} ({e}); repair or remove the line") from None


def parquet_rows(path: str, column: str) -> Iterator[tuple]:
    """The rows of a .parquet, with `column` alone."""
    table = open_parquet(path, column)
    row, total = 0, table.metadata.num_rows
    try:
        for group in range(table.num_row_groups):
            # One at a time: asked for all at once, Arrow keeps the buffers of each until the last is read.
            for batch in table.iter_batches(256, row_groups=[group], columns=[column], use_threads=False):
                for value in batch.column(0):
                    row += 1
                    yield {column: value.as_py()}, f"{path}, row {row}", row / total
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        why = first_line(e)
        raise UserError(f"{path}: cannot be read after row {row} ({why}); fetch it again") from None


def open_parquet(path: str, column: str) -> parquet.ParquetFile:
    """A .parquet that has this column."""
    try:
        # Buffered: otherwise a whole row group of the column, often a gigabyte, is read at once.
        table = parquet.ParquetFile(path, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError, UnicodeError) as e:  # the last: in the file's name
        why = first_line(e)
        raise UserError(f"{path}: no parquet file or a damaged one ({why}); fetch it again") from None
    check_column(column, table.schema_arrow.names, path)
    return table
