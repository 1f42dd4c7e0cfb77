"""OpenWebText in GPT-2's vocabulary, 9 billion tokens, with the validation documents of nanoGPT.

    python prepare_owt.py                                   # from the Hugging Face hub into data/openwebtext
    python prepare_owt.py --data_files owt/*.parquet        # from files that you have

Documents keep the order of the corpus, each followed by an end-of-text id. Needs 18 GB for the result, as
much again while its parts are joined, and from the hub 54 GB for its cache (HF_HOME says where). Killed
anywhere, it goes on when started again.

nanoGPT's own preparation of the whole corpus comes to 9,035,582,198 tokens for training and 4,434,897 for
validation, in 8,013,769 documents together.
"""

import math
from collections.abc import Iterator

import numpy as np

from inheritune.base.errors import UserError, one_line
from inheritune.data.sources import Source, hub_parser, open_corpus
from inheritune.data.text_files import Piece
from inheritune.data.tokenizer import load_tokenizer
from inheritune.data.writer import write_tokens

DATASET = "Skylion007/openwebtext"
PARQUET = "7577b918bd30b25df0b88bb718dc8a6c80cb619b"  # where this dataset is parquet, not a loading script
VAL_FRACTION, SEED = 0.0005, 2357  # nanoGPT's


def load(args) -> Source:
    """The files, or the hub dataset. Where it still holds a loading script, which the datasets library no
    longer runs, the revision in which the hub itself converted it to parquet."""
    try:
        return open_corpus(args, False)
    except UserError as e:
        if "scripts are no longer supported" not in str(e) or args.dataset != DATASET:
            raise
    print(f"{DATASET} holds a loading script; taking revision {PARQUET}")
    return open_corpus(args, False, revision=PARQUET)


def validation_documents(n: int) -> np.ndarray:
    """A bool array of length `n`, true for the documents that nanoGPT holds out: `datasets` permutes their
    numbers with numpy's default generator and takes the first, one for every 2000 or part of it."""
    held_out = np.zeros(n, bool)
    held_out[np.random.default_rng(SEED).permutation(n)[: math.ceil(VAL_FRACTION * n)]] = True
    return held_out


def hold_out(pieces: Iterator[Piece], held_out: np.ndarray) -> Iterator[Piece]:
    """Yield the pieces; held_out[i] says whether document i is validation text. Without split_on each piece
    holds one text."""
    document = 0
    for piece in pieces:
        yield piece._replace(split="val" if held_out[document] else "train")
        document += piece.end


@one_line
def main(argv=None):
    """Command line: OpenWebText, from the hub or from local files, into a data folder."""
    args = hub_parser(__doc__, "data/openwebtext", DATASET).parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    source = load(args)
    held_out = validation_documents(source.documents())
    source = source._replace(pieces=hold_out(source.pieces, held_out))
    write_tokens(args.out, "prepare_owt.py", source, tokenizer, args.num_proc)


if __name__ == "__main__":
    main()
