"""Text as people have it: what is read of it, what is refused, and what is said to be left out."""

import csv
import gzip
import io
import json
import os
import time

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import prepare
from inheritune.base.errors import UserError
from inheritune.data import text_files
from inheritune.data.reader import Tokens
from inheritune.data.sources import open_files, read_hub
from inheritune.data.tokenizer import load_tokenizer
from tests.tiny import refusal, write_files

TWO = ['one, "two"\nthree é', "four"]


def table(folder, name, texts=TWO):
    """A file with these texts as rows, in the form that its name says."""
    rows = [{"id": 1, "text": text} for text in texts]
    kind = name.lower().removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if kind == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, ["id", "text"])
        writer.writeheader()
        writer.writerows(rows)
        content = out.getvalue().encode()
    elif kind == "tsv":
        content = "\n".join(["id\ttext", *(f"1\t{text}" for text in texts)]).encode()
    elif name.startswith("array"):
        content = json.dumps(rows, indent=1).encode()
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name.startswith("bom"):
        content = b"\xef\xbb\xbf" + content
    pack = {"gz": gzip.compress, "st": zstandard.compress}.get(name[-2:].lower(), bytes)
    (folder / name).write_bytes(pack(content))
    return folder / name


def opened(*paths, column=None, split_on="", val=()):
    return open_files([str(p) for p in paths], [str(p) for p in val], not val, column, split_on, "out")


def documents(*paths, **options):
    """[(split, text)] of the documents."""
    found, going_on = [], False
    for piece in opened(*paths, **options).pieces:
        assert piece.continues == going_on
        if going_on:
            piece.texts[0] = found.pop()[1] + piece.texts[0]
        found += [(piece.split, text) for text in piece.texts]
        going_on = not piece.end
    assert not going_on
    return found


def texts(*paths, **options):
    return [text for _, text in documents(*paths, **options)]


def prepared(out, *argv, script=prepare):
    """{split: its text, with | for end-of-text} of what a prepare script makes as bytes."""
    script.main([*map(str, argv), "--tokenizer", "bytes", "--out", str(out)])
    tokenizer, found = load_tokenizer("bytes"), {}
    for split in ("train", "val"):
        tokens = Tokens(str(out), split)
        found[split] = tokenizer.decode(tokens.read(0, len(tokens)).tolist()).replace("<|endoftext|>", "|")
    return found


# Tables


@pytest.mark.parametrize(
    "name",
    [
        *("a.json", "a.ndjson", "A.JSONL", "a.csv", "a.tsv", "array.json", "a.json.gz", "A.CSV.ZST"),
        *("array.json.zst", "bom.jsonl", "bom.csv", "bom.tsv.gz", "bom-array.json", "array-bom.JSON.GZ"),
    ],
)
def test_tables_of_all_kinds(tmp_path, name):
    rows = ['"he said', "second", 'third"'] if "tsv" in name else TWO  # a .tsv has no quoting
    assert texts(table(tmp_path, name, rows)) == rows


def test_rows_that_hold_null_are_left_out_and_counted(tmp_path, capsys):
    path = table(tmp_path, "a.jsonl", [None, "a", None, "b"])
    assert texts(path) == ["a", "b"]
    assert "a.jsonl: 2 rows left out, which hold null in place of text" in capsys.readouterr().err
    rows = [{"text": "a"}, {"text": None}]
    assert [piece.texts for piece in read_hub(iter(rows), 2)] == [["a"]]
    assert "the dataset: 1 rows left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.json", b'[{"text": "a"}, 3]', "a.json, element 2: a JSON int"),
        ("a.json", b'[{"text": "a"}', "a.json: cannot be read after its beginning (Expecting"),
        ("a.jsonl", b'{"text": "a"}\n{"text":\n', "a.jsonl: cannot be read after line 1 (Expecting"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}', "a.jsonl, line 2: 'text' holds a int, not text"),
        ("a.csv", b"id,body\n1,a\n", "a.csv, line 1: no column 'text' among id, body"),
        ("a.csv", b"id,text\n1\n", "a.csv, line 2: 1 fields, but line 1 names 2"),
        ("a.csv", b"id,text\n1,Hello, world, lost\n", "a.csv, line 2: 4 fields, but line 1 names 2"),
        ("a.tsv", b"id\ttext\n1\ta\n2\tHello\tworld\n", "a.tsv, line 3: 3 fields, but line 1 names 2"),
        ("a.csv", b"id,text\n1,a\n2,\xe9\n", "a.csv: cannot be read after its beginning ('utf-8' codec"),
        ("a.csv", b'text\n"one\ntwo\n', "a.csv: cannot be read after its beginning (unexpected"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), "a.jsonl: UTF-16"),
        ("a.txt", b"plain text" * 50 + b"\xff\n", "byte 0xff in position 500: invalid start byte); convert"),
        ("a.txt", "plain text".encode("utf-16-be"), "a.txt: UTF-16"),
        (
            "a.txt.gz",
            gzip.compress(b"text" * 9999, mtime=0)[:-9],
            "a.txt.gz: cannot be read after character 0 (Trunc",
        ),
        ("a.zst", zstandard.compress(b"text" * 9999)[:-5], "a.zst: cannot be read after character 0"),
        ("a.jsonl.gz", b"", "a.jsonl.gz holds no gzip"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path, name, content, said):
    with pytest.raises(UserError) as e:
        documents(write_files(tmp_path, {name: content}) / name)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_parquet_may_have_views_a_dictionary_or_binary(tmp_path):
    for name, kind in (
        ("view", pyarrow.string_view()),
        ("dictionary", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
        ("large", pyarrow.large_string()),
        ("binary", pyarrow.binary()),
    ):
        column = pyarrow.array(TWO, pyarrow.string()).cast(kind)
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
        assert texts(tmp_path / f"{name}.parquet") == TWO
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"a", b"\xff"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read after row 1 \('utf-8' codec"):
        documents(tmp_path / "a.parquet")


# What a file is, its content decides


@pytest.mark.parametrize("name", ["RC_2015-01.zst", "RC_2015-01", "a.txt", "a.md.gz"])
def test_json_lines_under_any_name_are_a_table(tmp_path, name):
    pack = zstandard.compress if name.endswith("zst") else gzip.compress if name.endswith("gz") else bytes
    (tmp_path / name).write_bytes(pack(b'{"id": 1, "body": "one"}\n{"id": 2, "body": "two"}\n'))
    assert texts(tmp_path / name, column="body") == ["one", "two"]
    with pytest.raises(UserError, match=f"{name}, line 1: no column 'text' among id, body"):
        documents(tmp_path / name)


def test_what_only_looks_like_json_is_text(tmp_path):
    for text in ("{not json}\nat all", "[a list]", "{\n}", '"words"\n'):
        (tmp_path / "a.txt").write_text(text)
        assert texts(tmp_path / "a.txt") == [text]


def test_compression_and_parquet_under_any_name(tmp_path):
    (tmp_path / "a.txt").write_bytes(gzip.compress(b"packed"))
    assert texts(tmp_path / "a.txt") == ["packed"]
    pyarrow.parquet.write_table(pyarrow.table({"text": TWO}), tmp_path / "b.txt")
    assert texts(tmp_path / "b.txt") == TWO


def test_a_pointer_of_git_lfs_says_git_lfs_pull(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("a.txt", "b.parquet", "c.jsonl.gz"):
        (tmp_path / name).write_text(pointer)
        for path in (tmp_path / name, tmp_path):
            with pytest.raises(UserError, match=r"is a pointer of Git LFS, .* run `git lfs pull` there"):
                documents(path)


def test_a_long_window_of_zstd_has_the_true_cure(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    (tmp_path / "a.txt.zst").write_bytes(compressor.compress(b"words " * (1 << 26)))
    with pytest.raises(UserError, match=r"a.txt.zst: cannot be read .* zstd -d --long=31"):
        documents(tmp_path / "a.txt.zst")


# Plain text


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_a_compressed_text(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(text_files, "PIECE", 1000)
    text = "Zwölf Boxkämpfer jagen Viktor.\n" * 500 + "é" * 5000  # without a blank at which it could be cut
    name = tmp_path / {bytes: "a.TXT", gzip.compress: "a.txt.gz"}.get(pack, "a.md.zst")
    name.write_bytes(pack(b"\xef\xbb\xbf" + text.encode()))
    pieces = list(opened(name).pieces)
    assert "".join(text for piece in pieces for text in piece.texts) == text and len(pieces) > 10
    assert opened(name).documents() == sum(piece.end for piece in pieces) == 1
    shares = [piece.progress for piece in pieces]
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_byte_order_marks_and_cr_lf(tmp_path):
    bom = b"\xef\xbb\xbf"
    write_files(tmp_path, {"a.txt": bom + b"one", "b.txt": bom + b"two" + bom})
    assert texts(tmp_path / "a.txt", tmp_path / "b.txt") == ["one", "two\ufeff"]
    write_files(tmp_path, {"a.jsonl": b'{"text": "one"}\r\n{"text": "two\\r\\n"}\r\n\r\n'})
    assert texts(tmp_path / "a.jsonl") == ["one", "two\r\n"]
    write_files(tmp_path, {"a.csv": b'text\r\none\r\n"two\r\n"\r\n'})
    assert texts(tmp_path / "a.csv") == ["one", "two\r\n"]


@pytest.mark.parametrize("piece", [1 << 17, 300, 40])
def test_split_on_parts_wherever_the_pieces_of_a_file_end(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(text_files, "PIECE", piece)
    parts = [f"document {i} " + "words " * (i % 50) for i in range(200)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(parts) + "<|endoftext|>\n")
    assert texts(tmp_path / "a.txt", split_on="<|endoftext|>") == parts
    assert opened(tmp_path / "a.txt", split_on="<|endoftext|>").documents() == len(parts)
    (tmp_path / "b.txt").write_bytes("\r\n\r\n".join(parts).encode())
    assert texts(tmp_path / "b.txt", split_on="\n\n") == parts
    (tmp_path / "b.txt").write_text("one\n\n\n\ntwo\n\n")
    assert texts(tmp_path / "b.txt", split_on="\n\n") == ["one", "two"], "nothing is no document"


def test_the_end_of_text_spelled_out_is_ordinary_text_and_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(["some words"] * 200))
    prepared(tmp_path / "plain", tmp_path / "a.txt")
    shown = capsys.readouterr().out
    assert "the text holds <|endoftext|> 199 times" in shown and "--split_on '<|endoftext|>'" in shown
    assert (Tokens(str(tmp_path / "plain"), "train").read(0, 2000) == 256).sum() == 0
    found = prepared(tmp_path / "parted", tmp_path / "a.txt", "--split_on", "<|endoftext|>")
    assert (found["train"] + found["val"]).count("|") == 200
    assert "ordinary" not in capsys.readouterr().out


def test_a_split_on_that_never_occurs(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    said = r"stands nowhere in the text files.*; a line end is written \$'\\n\\n', with the \$"
    with pytest.raises(UserError, match=said):
        documents(tmp_path / "a.txt", split_on="\\n\\n")


def least_seconds(n, *arguments, **options):
    """CPU seconds of reading n texts, the least of three: other work on the machine adds to them."""
    spent = []
    for _ in range(3):
        began = time.process_time()
        assert len(texts(*arguments, **options)) == n
        spent.append(time.process_time() - began)
    return min(spent)


def test_a_line_a_document_is_read_fast(tmp_path):
    """Not quadratic: the time of four times the text is not much over four times the time."""
    line, spent = "一行中文文本。" * 4 + "\n", []
    for copies in (20_000, 80_000):
        (tmp_path / "a.txt").write_text(line * copies)
        spent.append(least_seconds(copies, tmp_path / "a.txt", split_on="\n"))
    assert spent[1] < 12 * spent[0]


# Folders


def test_a_folder_of_text_and_of_other_files(tmp_path, capsys):
    names = ("b.pdf", "c.PDF", "d", ".hidden.pdf", "LICENSE.txt")
    write_files(tmp_path / "in", dict.fromkeys(names, "x") | {"README.md": "a note"})
    os.mkfifo(tmp_path / "in/pipe.txt")
    assert texts(tmp_path / "in") == ["x", "a note"]  # of text files all are text
    left = "in: 4 files left out (2 .pdf, 1 no regular file, 1 without a suffix)"
    assert left in capsys.readouterr().err
    table(tmp_path / "in", "A.CSV")
    assert texts(tmp_path / "in") == TWO
    left = "in: 6 files left out (2 .pdf, 2 cards and licences, 1 no regular file, 1 without a suffix)"
    assert left in capsys.readouterr().err


def test_a_failure_to_list_a_folder_is_not_passed_over(tmp_path, monkeypatch):
    write_files(tmp_path / "in", {"a.txt": "text", "sub/b.txt": "text"})
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    said = refusal(prepare.main, [tmp_path / "in", "--out", tmp_path / "out", "--tokenizer=bytes"])
    assert "Permission denied" in said and str(tmp_path / "in/sub") in said


def test_a_data_set_in_the_hubs_layout(tmp_path, capsys):
    for split in ("train", "validation", "test"):
        path = tmp_path / f"in/data/{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": [split]}), path)
    write_files(tmp_path / "in", {"README.md": "# card", "dataset_infos.json": "{}", "index.json": "{}"})
    assert documents(tmp_path / "in") == [("train", "train"), ("val", "validation")]
    said = capsys.readouterr().err
    assert "2 metadata" in said and "1 of no split" in said and "1 of the split test" in said
    assert prepared(tmp_path / "out", tmp_path / "in") == {"train": "train|", "val": "validation|"}


@pytest.mark.parametrize("others", [{}, {"TinyStories-train.txt": "text", "TinyStories-valid.txt": "text"}])
def test_a_card_says_which_files_are_for_training_and_validation(tmp_path, others):
    """... also where others are named so, as TinyStories has them."""
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/a*\n"
    card += "  - split: validation\n    path: data/b*\n---\n"
    rows = {f"data/{name}.jsonl": json.dumps({"text": name}) for name in "ab"}
    write_files(tmp_path, rows | others | {"README.md": card})
    assert documents(tmp_path) == [("train", "a"), ("val", "b")]


def test_a_card_without_training_files_is_refused_and_a_broken_one_says_nothing(tmp_path):
    files = {f"data/{name}.jsonl": json.dumps({"text": name}) for name in "ab"}
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: extra\n    path: data/*\n---\n"
    write_files(tmp_path, files | {"README.md": card})
    with pytest.raises(UserError, match="names files for extra, none for train"):
        documents(tmp_path)
    (tmp_path / "README.md").write_text("---\ndata_files: 3\n---\n")
    assert documents(tmp_path) == [("train", "a"), ("train", "b")]


def test_forms_of_tables_that_other_tools_write(tmp_path):
    """Arrow's files beside its streams, pzstd's frames, and two columns of one name, which are an error."""
    rows = pyarrow.table({"text": TWO})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as f, pyarrow.ipc.new_file(f, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=1)
    assert texts(tmp_path / "a.arrow") == TWO
    frame = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    (tmp_path / "b.txt.zst").write_bytes(frame + zstandard.compress(b"some text"))
    assert texts(tmp_path / "b.txt.zst") == ["some text"]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet: cannot be read"):
        texts(tmp_path / "c.parquet")


def test_what_save_to_disk_wrote(tmp_path):
    data = datasets.Dataset.from_dict({"text": TWO})
    data.save_to_disk(tmp_path / "one")
    assert documents(tmp_path / "one") == [("train", text) for text in TWO]
    datasets.DatasetDict({"train": data, "validation": data.select([1])}).save_to_disk(tmp_path / "more")
    assert documents(tmp_path / "more") == [*documents(tmp_path / "one"), ("val", "four")]


def test_names_that_say_validation_are_refused_until_the_user_says_what_they_are(tmp_path):
    write_files(tmp_path, {"a.txt": "one", "notes_test.txt": "two"})
    with pytest.raises(UserError, match=r"notes_test\.txt says test; name the training files yourself"):
        documents(tmp_path)
    write_files(tmp_path / "in", {"a.txt": "one", "test/b.txt": "two"})
    with pytest.raises(UserError, match=r"test/b\.txt says test; name the training files yourself"):
        documents(tmp_path / "in")
    assert texts(tmp_path / "a.txt", tmp_path / "notes_test.txt") == ["one", "two"]
    found = documents(tmp_path / "a.txt", val=[tmp_path / "notes_test.txt"])
    assert found == [("train", "one"), ("val", "two")]


def test_many_small_files_take_linear_time(tmp_path):
    spent = []
    for n in (500, 2000):
        write_files(tmp_path / str(n), {f"{i}.txt": "text" for i in range(n)})
        spent.append(least_seconds(n, tmp_path / str(n)))
    assert spent[1] < 10 * spent[0]


# The share for validation


def test_validation_is_a_share_of_tokens_however_unequal_the_documents(tmp_path):
    files = {"a.txt": "short words " * 333, "b.txt": "long words " * 20_000, "readme.md": "a note here"}
    write_files(tmp_path, files)
    for names in (["a.txt", "b.txt"], ["b.txt", "a.txt"], ["b.txt", "readme.md"]):
        found = prepared(tmp_path / "-".join(names), *(tmp_path / name for name in names))
        assert 0.08 < len(found["val"]) / sum(map(len, found.values())) < 0.12
        whole = "".join((tmp_path / name).read_text() + "|" for name in names)
        assert (found["train"] + found["val"]).replace("|", "") == whole.replace("|", "")
        assert found["train"].endswith("|") and found["val"].endswith("|")


# Changed inputs


def test_a_long_input_that_changed_at_one_place_and_kept_its_time(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 1_000_000)
    before, when = opened(path).arguments, os.stat(path).st_mtime_ns
    path.write_bytes(b"a" * 500_000 + b"b" + b"a" * 499_999)
    os.utime(path, ns=(when, when))
    assert opened(path).arguments != before
