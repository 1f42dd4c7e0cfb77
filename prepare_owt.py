"""OpenWebText in GPT-2's vocabulary, 9 billion tokens, with the validation documents of nanoGPT.

    python prepare_owt.py                                   # from the Hugging Face hub into data/openwebtext
    python prepare_owt.py --data_files owt/*.parquet        # from files that you have

Documents keep the order of the corpus, each followed by an end-of-text id. Needs 18 GB for the result and,
from the hub, 54 GB for its cache (HF_HOME says where). Killed anywhere, it goes on when started again.
"""

import math
from collections.abc import Iterator

import numpy as np

from inheritune.base.errors import UserError, one_line
from inheritune.data.sources import Piece, Source, hub_parser, open_files, open_hub
from inheritune.data.tokenizer import load_tokenizer
from inheritune.data.writer import write_tokens

DATASET = "Skylion007/openwebtext"
PARQUET = "7577b918bd30b25df0b88bb718dc8a6c80cb619b"  # where this dataset is parquet, not a loading script
VAL_FRACTION, SEED = 0.0005, 2357  # nanoGPT's

# What the whole corpus comes to in GPT-2's vocabulary, by nanoGPT's own preparation.
DOCUMENTS = 8_013_769
TOKENS = {"train": 9_035_582_198, "val": 4_434_897}


def load(dataset: str) -> Source:
    """The hub dataset. Where it still holds a loading script, which the datasets library no longer runs, the
    revision in which the hub itself converted it to parquet."""
    try:
        return open_hub(dataset, False)
    except UserError as e:
        if "scripts are no longer supported" not in str(e) or dataset != DATASET:
            raise
    print(f"{dataset} holds a loading script; taking revision {PARQUET}")
    return open_hub(dataset, False, revision=PARQUET)


def validation_documents(n: int) -> np.ndarray:
    """A bool array of length `n`, true for the documents that nanoGPT holds out: `datasets` permutes their
    numbers with numpy's default generator and takes the first, one for every 2000 or part of it."""
    held_out = np.zeros(n, bool)
    held_out[np.random.default_rng(SEED).permutation(n)[: math.ceil(VAL_FRACTION * n)]] = True
    return held_out


def compare(meta: dict) -> None:
    """Print whether the counts in a meta.json with GPT-2's ids are those of the whole corpus."""
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


def hold_out(pieces: Iterator[Piece], held_out: np.ndarray) -> Iterator[Piece]:
    """Yield the pieces, those of the documents numbered in `held_out` as validation text."""
    document = 0
    for piece in pieces:
        yield piece._replace(split="val" if held_out[document] else "train")
        document += piece.end


@one_line
def main(argv=None):
    """Command line: OpenWebText, from the hub or from local files, into a data folder."""
    args = hub_parser(__doc__, "data/openwebtext", DATASET).parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    files = args.data_files
    source = open_files(files, None, None, "", args.out) if files else load(args.dataset)
    held_out = validation_documents(source.documents())
    source = source._replace(pieces=hold_out(source.pieces, held_out))
    compare(write_tokens(args.out, "prepare_owt.py", source, tokenizer, args.num_proc))


if __name__ == "__main__":
    main()
