"""OpenWebText in GPT-2's vocabulary, 9 billion tokens, with the validation documents of nanoGPT.

    python prepare_owt.py                                   # from the Hugging Face hub into data/openwebtext
    python prepare_owt.py --data_files owt/*.parquet        # from files that you have

Each document is followed by an end-of-text id, and the documents keep the order of the corpus. Needs 18 GB for the
result and, from the hub, about 54 GB for its cache (set HF_HOME to say where). Killed anywhere, it goes on when
started again.

Machines can share the work (parts.py): `--worker 0/8` to `--worker 7/8`, then `--join 8`. Each split is then one
file from each of them, and read one after the other they are train.bin and val.bin of a single machine, byte for byte.
"""

import functools
import math

import numpy as np

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.data.parts import add_sharing_flags, check_join_flags, join, part_of, share, within
from inheritune.data.sources import (
    check_tables,
    count_documents,
    find_files,
    fingerprint,
    load_hub,
    place_of,
    read_files,
    read_hub,
)
from inheritune.data.tokenizer import load_tokenizer
from inheritune.data.writer import UNSET, Stream, add_shared_flags, check_shared_flags, unfinished, write_tokens

DATASET = "Skylion007/openwebtext"
PARQUET = "7577b918bd30b25df0b88bb718dc8a6c80cb619b"  # where this dataset is parquet, not a loading script
SCRIPT = "prepare_owt.py"
VAL_FRACTION, SEED = 0.0005, 2357  # nanoGPT's

# What the whole corpus comes to in GPT-2's vocabulary, by nanoGPT's own preparation.
DOCUMENTS = 8_013_769
TOKENS = {"train": 9_035_582_198, "val": 4_434_897}


@one_line
def main(argv=None):
    """Command line: OpenWebText, from the hub or from local files, into a data folder."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="data/openwebtext", help="folder to write")
    parser.add_argument("--dataset", default=DATASET, help="hub dataset, or a local folder in the hub's layout")
    parser.add_argument("--revision", default="main", help="its branch or commit")
    parser.add_argument("--tokenizer", default="gpt2", help="a tiktoken name, bytes, or a .tiktoken ranks file")
    help = "read these instead of the hub: .parquet, .jsonl[.gz|.zst], .txt, folders or glob patterns"
    parser.add_argument("--data_files", nargs="+", metavar="PATH", help=help + UNSET)
    add_shared_flags(parser)
    add_sharing_flags(parser)
    args = parser.parse_args(argv)
    check_shared_flags(args)
    if args.join is not None:
        check_join_flags(parser, args)
        compare(join(args.out, args.join, SCRIPT))
    else:
        tokenise(args)


def tokenise(args):
    """The whole corpus, or one worker's part of it, into the folder that the arguments name."""
    tokenizer = load_tokenizer(args.tokenizer)
    if args.data_files:
        files = find_files(args.data_files)
        check_tables(files, args.text_column)
        counts = count_documents(files, args.text_column)
        pieces = functools.partial(read_files, files, args.text_column)
        arguments = fingerprint(args.data_files, files)
    else:
        dataset, revision = load(args.dataset, args.revision, args.text_column)
        counts = [len(dataset)]
        pieces = functools.partial(read_hub, dataset, args.text_column, len(dataset))
        arguments = {"dataset": args.dataset, "revision": revision}
    n = sum(counts)
    if n < 2:
        raise UserError(f"{n} documents cannot be parted into training and validation; give more")
    arguments |= {"text_column": args.text_column, "documents": n}
    out, documents, needed = args.out, range(n), ("train", "val")
    if args.worker:
        out, arguments = part_of(args.out, args.worker, arguments)
        documents, needed = share(n, args.worker), ()

    at = place_of(documents.start, counts)
    with unfinished(out, SCRIPT, arguments, tokenizer, at, documents.start) as progress:
        if progress is None:
            return
        held_out = validation_documents(n)
        streams = {split: Stream(out, [f"{split}.bin"], tokenizer) for split in ("train", "val")}
        pieces = functools.partial(within, documents, progress["documents"], pieces)
        meta = write_tokens(
            progress, streams, pieces, lambda i: "val" if held_out[i] else "train", args.num_proc, needed
        )
        if not args.worker:
            compare(meta)


def load(dataset, revision, column):
    """(The hub dataset, the revision it is of). Where `main` still holds a loading script, which the datasets
    library no longer runs, that is the revision in which the hub itself converted it to parquet."""
    try:
        return load_hub(dataset, False, column, revision=revision), revision
    except UserError as e:
        if "scripts are no longer supported" not in str(e) or (dataset, revision) != (DATASET, "main"):
            raise
    print(f"{dataset} holds a loading script; taking revision {PARQUET}")
    return load_hub(dataset, False, column, revision=PARQUET), PARQUET


def validation_documents(n):
    """A bool array of length `n`, true for the documents that nanoGPT holds out.

    `datasets` permutes the document numbers with numpy's default generator and tests on the first of them, one
    for every 2000 documents or part of it.
    """
    held_out = np.zeros(n, bool)
    held_out[np.random.default_rng(SEED).permutation(n)[: math.ceil(VAL_FRACTION * n)]] = True
    return held_out


def compare(meta):
    """Print whether document and token counts in a meta.json are those of the whole corpus, if the ids are GPT-2's."""
    if meta["tokenizer"]["n_vocab"] != 50257:
        return
    n = sum(split["documents"] for split in meta["splits"].values())
    tokens = {name: split["tokens"] for name, split in meta["splits"].items()}
    if (n, tokens) == (DOCUMENTS, TOKENS):
        print("the counts are those of the whole OpenWebText as nanoGPT prepares it")
        return
    found = f"{n:,} documents, {tokens['train']:,} train and {tokens['val']:,} val tokens"
    expected = f"{DOCUMENTS:,}, {TOKENS['train']:,} and {TOKENS['val']:,}"
    print(f"warning: {found}; the whole OpenWebText has {expected}")


if __name__ == "__main__":
    main()
