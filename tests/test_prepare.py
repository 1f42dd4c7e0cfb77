"""The three prepare scripts: the tokens they write, and what they say when something is wrong."""

import argparse
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard

import prepare
import prepare_fineweb
import prepare_owt
from inheritune.base.files import read_json, sha256
from inheritune.data import standard_library, writer
from inheritune.data.standard_library import python_documentation, python_sources
from inheritune.data.tokenizer import load_tokenizer
from tests.assets import english, gpt2
from tests.tiny import ROOT


@pytest.fixture(scope="module")
def texts():
    """300 documents of a few hundred characters, the empty one and some that are not English among them."""
    draw = random.Random(1)
    whole = "".join(english())
    places = [draw.randrange(len(whole)) for _ in range(295)]
    documents = [whole[i : i + draw.randrange(1500)] for i in places]
    return [*documents, "", " ", "<|endoftext|>", "naïve 日本語 🙂", ""]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(writer, "BATCH", 5000)


def write_tables(folder, texts):
    """The same documents as .parquet, .jsonl, .jsonl.gz and .jsonl.zst."""
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=70)
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines[:5000]) + gzip.compress(lines[5000:]))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines[:5000]) + zstandard.compress(lines[5000:]))


def ids(folder, name):
    return np.fromfile(folder / name, read_json(folder / "meta.json")["dtype"])


def same(a, b):
    """Do two folders hold the same files with the same bytes?"""
    contents = [{name: sha256(folder / name) for name in os.listdir(folder)} for folder in (a, b)]
    return contents[0] == contents[1]


def check_meta(folder):
    """Everything meta.json says must be so; gives it back."""
    meta = read_json(folder / "meta.json")
    tokenizer = load_tokenizer(meta["tokenizer"]["name"], folder=folder)
    assert tokenizer.describe() == meta["tokenizer"] and meta["format"] == 1
    names = {"meta.json", *tokenizer.files}
    for split in meta["splits"].values():
        for key in ("tokens", "documents", "bytes"):
            assert split[key] == sum(shard[key] for shard in split["shards"])
        for shard in split["shards"]:
            tokens = ids(folder, shard["file"])
            assert len(tokens) == shard["tokens"] and sha256(folder / shard["file"]) == shard["sha256"]
            assert (tokens == meta["tokenizer"]["eot"]).sum() == shard["documents"]
            text = tokens[tokens != meta["tokenizer"]["eot"]]
            assert len(tokenizer.decode_bytes(text.tolist())) == shard["bytes"]
            names.add(shard["file"])
    assert set(os.listdir(folder)) == names
    return meta


# prepare_owt.py


@pytest.mark.parametrize("n", [2, 2000, 2001])
def test_validation_documents_are_those_of_datasets(n):
    import datasets

    numbers = datasets.Dataset.from_dict({"number": list(range(n))})
    split = numbers.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    held_out = prepare_owt.validation_documents(n)
    assert np.flatnonzero(held_out).tolist() == sorted(split["test"]["number"])
    assert np.flatnonzero(~held_out).tolist() == sorted(split["train"]["number"])


@pytest.mark.parametrize("kind, threads", [("parquet", 2), ("jsonl", 1), ("jsonl.gz", 1), ("jsonl.zst", 1)])
def test_owt_tokens(tmp_path, texts, kind, threads, small_batches):
    """Against tiktoken and datasets themselves, as nanoGPT's script used them."""
    import datasets

    write_tables(tmp_path, texts)
    out = tmp_path / "out"
    argv = ["--data_files", f"{tmp_path}/a.{kind}", "--out", str(out), "--tokenizer", gpt2()]
    prepare_owt.main([*argv, f"--num_proc={threads}"])
    dataset = datasets.Dataset.from_dict({"text": texts, "i": range(len(texts))})
    split = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    encoding = load_tokenizer("gpt2").encoding
    for ours, theirs in (("train", "train"), ("val", "test")):
        rows = sorted(zip(split[theirs]["i"], split[theirs]["text"], strict=True))
        expected = [i for _, text in rows for i in [*encoding.encode_ordinary(text), 50256]]
        assert ids(out, f"{ours}.bin").tolist() == expected
    assert check_meta(out)["dtype"] == "uint16"


def test_hub_path_equals_files(tmp_path, texts, monkeypatch):
    """A local folder in the hub's layout takes the way of the hub: mapped for OWT, streaming for FineWeb."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    write_tables(tmp_path, texts)
    os.rename(tmp_path / "a.parquet", tmp_path / "hub" / "a.parquet")
    for script, flags in ((prepare_owt, []), (prepare_fineweb, ["--shard_tokens", "30000"])):
        metas = []
        for flag, path in (("--data_files", "a.jsonl"), ("--dataset", "hub")):
            out = tmp_path / f"{script.__name__}{flag}"
            argv = [flag, str(tmp_path / path), "--tokenizer", "bytes", "--num_proc", "1", "--out", str(out)]
            script.main([*argv, *flags])
            metas.append(check_meta(out))
        assert metas[0]["splits"] == metas[1]["splits"]


def test_loading_script_falls_back_to_the_parquet_revision(monkeypatch):
    asked = []

    def open_corpus(args, streaming, revision=None):
        asked.append(revision)
        if not revision:
            raise prepare_owt.UserError("Dataset scripts are no longer supported, but found openwebtext.py")
        return "rows"

    monkeypatch.setattr(prepare_owt, "open_corpus", open_corpus)
    args = argparse.Namespace(dataset=prepare_owt.DATASET)
    assert prepare_owt.load(args) == "rows"
    assert asked == [None, prepare_owt.PARQUET]


# prepare_fineweb.py


def test_fineweb_shards(tmp_path, texts, small_batches):
    write_tables(tmp_path, texts)
    flags = ["--data_files", f"{tmp_path}/a.jsonl", "--shard_tokens", "10000", "--tokenizer", "bytes"]
    expected = [i for text in texts for i in [*text.encode(), 256]]
    for out, most in ((tmp_path / "whole", 0), (tmp_path / "limited", 23_456)):
        prepare_fineweb.main([*flags, "--num_proc", "1", "--out", str(out), "--max_tokens", str(most)])
        splits = check_meta(out)["splits"]
        shards = [shard for split in ("val", "train") for shard in splits[split]["shards"]]
        names = [shard["file"] for shard in shards]
        assert names[:3] == ["val_000000.bin", "train_000000.bin", "train_000001.bin"]
        assert all(10_000 <= shard["tokens"] < 12_600 for shard in shards[:-1])
        found = np.concatenate([ids(out, name) for name in names])
        assert found.tolist() == expected[: len(found)]
        assert most <= len(found) < most + 2600 if most else len(found) == len(expected)


# prepare.py


def test_the_python_corpus_holds_the_sources_and_holds_out_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    some = ("argparse", "json.decoder", "antigravity", "encodings.cp437", "html.entities", "test.support")
    files = list(standard_library.standard_library())
    files = [(name, text) for i, (name, text) in enumerate(files) if i % 20 == 0 or name in some]
    monkeypatch.setattr(standard_library, "standard_library", lambda: iter(files))  # a part of it, for speed
    code, documentation = dict(python_sources()), dict(python_documentation())
    prepare.main([])
    meta = check_meta(tmp_path / "data/python")
    assert {"argparse", "json.decoder", "antigravity"} <= code.keys()
    assert not {"encodings.cp437", "html.entities"} & code.keys()
    assert not any(name.startswith(("_sysconfigdata", "test.")) for name in code)
    names = [*code, *documentation]
    held_out = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0 for name in names}
    n_val = sum(held_out[name] for name in names)
    splits = meta["splits"]
    assert splits["val"]["documents"] == n_val and 0.02 < n_val / len(names) < 0.2
    assert splits["train"]["documents"] == len(names) - n_val
    text = bytes(ids(tmp_path / "data/python", "val.bin").astype(np.uint8))
    for name in code:
        assert (code[name].encode() in text) == held_out[name]
    capsys.readouterr()
    prepare.main([])
    assert "already finished" in capsys.readouterr().out


def test_without_pydoc_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # importing it raises ImportError
    first, second = "Words. " * 8 + "End.", "More. " * 8 + "End."
    files = [("a", f'"""{first}"""\nclass B:\n    """{second}"""'), ("b", "")]
    monkeypatch.setattr(standard_library, "standard_library", lambda: iter(files))
    assert python_documentation() == [("a", f"a\n\n{first}\n\na.B\n\n{second}\n")]


@pytest.mark.parametrize(
    "text, inside",
    [(b"a", False), (b"\xe4", False), (b"", False), (b"\xa4a", True), ("\ufffd".encode(), True)],
)
def test_a_token_that_begins_inside_a_character(text, inside):
    """... begins with the rest of its bytes, or is U+FFFD, to which a tokenizer.json decodes such a rest."""
    assert writer.begins_inside_character(text) == inside


def test_validation_does_not_begin_inside_a_character(tmp_path):
    (tmp_path / "one.txt").write_text("日本語" * 100)
    prepare.main([str(tmp_path / "one.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "cut")])
    check_meta(tmp_path / "cut")
    parts = [bytes(ids(tmp_path / "cut", f"{s}.bin")[:-1].astype(np.uint8)) for s in ("train", "val")]
    assert len(parts[0].decode()) == 271 and b"".join(parts).decode() == "日本語" * 100


def test_links_and_odd_names(tmp_path):
    """A linked folder is read once, wherever it lies; a loop of links ends; a name need not be UTF-8."""
    folder, other = tmp_path / "text", tmp_path / "other"
    folder.mkdir(), other.mkdir()
    (folder / "a.txt").write_text("one")
    (other / "b.txt").write_text("two")
    with open(os.fsencode(other) + b"/caf\xe9.txt", "wb") as f:
        f.write(b"three")
    (other / "loop").symlink_to(folder)
    (folder / "c").symlink_to(other)
    (folder / "d").symlink_to(other)
    flags = ["--tokenizer", "bytes", "--num_proc", "1", "--val_fraction", "0.43", "--out"]
    prepare.main([str(folder), *flags, str(tmp_path / "out")])
    assert ids(tmp_path / "out", "train.bin").tolist() == [*b"one", 256, *b"two", 256]
    assert ids(tmp_path / "out", "val.bin").tolist() == [*b"three", 256]


def test_a_finished_folder_keeps_what_a_person_puts_there(tmp_path):
    (tmp_path / "a.txt").write_text("some words" * 20)
    command = [str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    prepare.main(command)
    mine, left = tmp_path / "out/train_000001.bin", tmp_path / "out/train_000000.part"
    mine.write_text("text"), left.write_text("text")
    prepare.main(command)
    assert mine.exists() and not left.exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory of a child process")
@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, kind):
    code = "import prepare_owt as p, resource as r, sys; p.main(sys.argv[1:]); "
    code += "print(r.getrusage(r.RUSAGE_SELF).ru_maxrss)"
    text, peaks = "".join(english()), []
    table = pyarrow.table({"text": [text[i : i + 2400] for i in range(0, len(text), 2400)]})
    for copies in (3, 20):  # written one by one: the memory of this process counts as its child's
        path, out = tmp_path / f"{copies}.{kind}", str(tmp_path / f"out{copies}")
        if kind == "txt":
            with open(path, "w") as f:
                f.writelines(text for _ in range(copies))
        else:
            with pyarrow.parquet.ParquetWriter(path, table.schema) as f:
                for _ in range(copies):
                    f.write_table(table)
        argv = ["--data_files", str(path), __file__, "--tokenizer", "bytes", "--num_proc", "1", "--out", out]
        done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, check=True, capture_output=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 20  # MB, for 41 MB more text


def test_an_error_after_the_folder_is_finished_takes_nothing_away(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("some text " * 50)
    argv = [str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(writer, "summary", lambda splits: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(SystemExit, match="No space left"):
            prepare.main(argv)
    prepare.main(argv)
    assert "finished" in capsys.readouterr().out
    check_meta(tmp_path / "out")


def test_splits_and_bytes_with_a_models_tokenizer(tmp_path):
    """Validation begins with a document, whose first token may be a part of a character. The blank that a
    tokenizer puts before a text is none of its bytes."""
    rows = {"whole": [f"日本語 text number {i}" for i in range(10)], "blank": ["abcd"] * 100}
    whole = tokenizers.Tokenizer(tokenizers.models.BPE())
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = tokenizers.decoders.ByteLevel()
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    whole.model = tokenizers.models.BPE({c: i for i, c in enumerate([*letters, "<eos>"])}, [])
    vocab = {c: i for i, c in enumerate(["▁", *"abcd", "<eos>"])}
    blank = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    blank.normalizer = tokenizers.normalizers.Prepend("▁")
    blank.decoder = tokenizers.decoders.Metaspace()
    for name, tokenizer in (("whole", whole), ("blank", blank)):
        folder = tmp_path / name
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
        text = "".join(json.dumps({"text": row}) + "\n" for row in rows[name])
        (folder / "a.jsonl").write_text(text)
        prepare.main([f"{folder}/a.jsonl", "--tokenizer", str(folder), "--out", f"{folder}/out"])
        splits = read_json(folder / "out/meta.json")["splits"]
        n, size = len(rows[name]), len(rows[name][0].encode())
        assert [splits[s]["documents"] for s in ("train", "val")] == [n - n // 10, n // 10]
        assert [splits[s]["bytes"] for s in ("train", "val")] == [(n - n // 10) * size, n // 10 * size]


def test_large_ids_take_uint32(tmp_path):
    vocab = {str(i): i for i in range(70_000)} | {"<eos>": 70_000}
    numbers = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="0"))
    numbers.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    numbers.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    (tmp_path / "a.jsonl").write_text('{"text": "3 65536"}\n{"text": "69999 1"}')
    out = tmp_path / "out"
    prepare.main([f"{tmp_path}/a.jsonl", "--val_fraction=0.5", f"--tokenizer={tmp_path}", f"--out={out}"])
    assert read_json(out / "meta.json")["dtype"] == "uint32"
    assert np.fromfile(out / "train.bin", "<u4").tolist() == [3, 65536, 70_000]


# Folders that are there already


def test_finished_with_other_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n')
    command = ["good.jsonl", "--val_fraction=0.5", "--out", "o", "--tokenizer", "bytes"]
    prepare.main(command)
    before = hashlib.sha256((tmp_path / "o" / "meta.json").read_bytes())
    prepare.main(command)
    assert "already finished: train 4 tokens in 1 documents" in capsys.readouterr().out
    other_script = ["--data_files", command[0], *command[2:]]
    for script, argv, said in (
        (prepare, [*command, "--val_fraction=0.6"], "val_fraction 0.5, not 0.6"),
        (prepare, ["one.jsonl", *command[1:]], "its input has changed"),
        (prepare_owt, other_script, "script 'prepare.py', not 'prepare_owt.py'"),
    ):
        with pytest.raises(SystemExit, match="choose another --out or delete it") as e:
            script.main(argv)
        assert said in e.value.code
    os.truncate(tmp_path / "o" / "train.bin", 2)
    with pytest.raises(SystemExit, match=r"train\.bin is missing or not as long"):
        prepare.main(command)
    assert hashlib.sha256((tmp_path / "o" / "meta.json").read_bytes()).digest() == before.digest()


def test_two_runs_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with writer.own_folder("o"), pytest.raises(SystemExit, match="another run"):
        prepare.main(["a.txt", "--out", "o", "--tokenizer", "bytes"])


def test_help_and_no_torch():
    names = "prepare, prepare_owt, prepare_fineweb"
    code = f"import sys, {names}; assert 'torch' not in sys.modules\nfor s in ({names}):\n"
    code += "    try: s.main(['--help'])\n    except SystemExit: pass"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert shown.count("(default: ") > 6 and "None" not in shown and "(default: )" not in shown
