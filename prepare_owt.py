"""OpenWebText in GPT-2's vocabulary, 9 billion tokens, with the validation documents of nanoGPT.

    python prepare_owt.py                                   # from the Hugging Face hub into data/openwebtext
    python prepare_owt.py --data_files owt/*.parquet        # from files that you have

Each document is followed by an end-of-text id, and the documents keep the order of the corpus. Needs 18 GB
for the result and, from the hub, about 54 GB for its cache (set HF_HOME to say where). Killed anywhere, it
goes on when started again.
"""

import math

import numpy as np

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.data.sources import Source, open_files, open_hub, parse_corpus
from inheritune.data.tokenizer import load_tokenizer
from inheritune.data.writer import BinWriter, write_tokens

DATASET = "Skylion007/openwebtext"
PARQUET = "7577b918bd30b25df0b88bb718dc8a6c80cb619b"  # where this dataset is parquet, not a loading script
VAL_FRACTION, SEED = 0.0005, 2357  # nanoGPT's

# What the whole corpus comes to in GPT-2's vocabulary, by nanoGPT's own preparation.
DOCUMENTS = 8_013_769
TOKENS = {"train": 9_035_582_198, "val": 4_434_897}


def load(dataset: str, revision: str, column: str) -> Source:
    """The hub dataset. Where `main` still holds a loading script, which the datasets library no longer runs,
    the revision in which the hub itself converted it to parquet."""
    try:
        return open_hub(dataset, False, column, revision=revision)
    except UserError as e:
        if "scripts are no longer supported" not in str(e) or (dataset, revision) != (DATASET, "main"):
            raise
    print(f"{dataset} holds a loading script; taking revision {PARQUET}")
    return open_hub(dataset, False, column, revision=PARQUET)


def validation_documents(n: int) -> np.ndarray:
    """A bool array of length `n`, true for the documents that nanoGPT holds out.

    `datasets` permutes the document numbers with numpy's default generator and tests on the first of them,
    one for every 2000 documents or part of it.
    """
    held_out = np.zeros(n, bool)
    held_out[np.random.default_rng(SEED).permutation(n)[: math.ceil(VAL_FRACTION * n)]] = True
    return held_out


def compare(meta: dict) -> None:
    """Print whether document and token counts in a meta.json are those of the whole corpus, if the ids are
    GPT-2's."""
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


@one_line
def main(argv=None):
    """Command line: OpenWebText, from the hub or from local files, into a data folder."""
    parser = Parser(description=__doc__)
    args = parse_corpus(parser, argv, out="data/openwebtext", dataset=DATASET)
    tokenizer = load_tokenizer(args.tokenizer)
    if args.data_files:
        source = open_files(args.data_files, args.text_column, args.split_on)
    else:
        source = load(args.dataset, args.revision, args.text_column)
    n = source.documents()
    if n < 2:
        raise UserError(f"{n} documents cannot be parted into training and validation; give more")
    arguments = source.arguments | {"text_column": args.text_column, "documents": n}

    with BinWriter(args.out, "prepare_owt.py", arguments, tokenizer) as writer:
        if writer.open():
            held_out = validation_documents(n)
            split_of = lambda i: "val" if held_out[i] else "train"  # noqa: E731
            compare(write_tokens(writer, source.pieces, split_of, args.num_proc))


if __name__ == "__main__":
    main()
