"""OpenWebText in GPT-2's vocabulary, 9 billion tokens, with the validation documents of nanoGPT.

    python prepare_owt.py                                   # from the Hugging Face hub into data/openwebtext
    python prepare_owt.py --data_files owt/*.parquet        # from files that you have

Each document is followed by an end-of-text id, and the documents keep the order of the corpus. Needs 18 GB
for the result and, from the hub, about 54 GB for its cache (set HF_HOME to say where). Killed anywhere, it
goes on when started again.
"""

import math
from collections.abc import Iterator

import numpy as np

from inheritune.base.cpus import usable_cpus
from inheritune.base.errors import Parser, UserError, one_line
from inheritune.data.sources import Piece, Source, open_files, open_hub
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


def hold_out(pieces: Iterator[Piece], held_out: np.ndarray) -> Iterator[Piece]:
    """Yield the pieces, those of the documents numbered in `held_out` as validation text."""
    document = 0
    for piece in pieces:
        yield piece._replace(split="val" if held_out[document] else "train")
        document += piece.end


@one_line
def main(argv=None):
    """Command line: OpenWebText, from the hub or from local files, into a data folder."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", default="data/openwebtext", help="folder to write")
    parser.add_argument(
        "--dataset", default=DATASET, help="hub dataset, or a local folder in the hub's layout"
    )
    help = "read these instead: tables or text files, folders or glob patterns, as prepare.py does"
    parser.add_argument("--data_files", nargs="+", default=[], metavar="PATH", help=help)
    parser.add_argument("--tokenizer", default="gpt2", help="as for prepare.py")
    parser.add_argument("--num_proc", type=int, default=usable_cpus(), help="threads that tokenise")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    if args.data_files:
        source = open_files(args.data_files, None, None, "", args.out)
    else:
        source = load(args.dataset)
    held_out = validation_documents(source.documents())
    source = source._replace(pieces=hold_out(source.pieces, held_out))
    compare(write_tokens(args.out, "prepare_owt.py", source, tokenizer, args.num_proc))


if __name__ == "__main__":
    main()
