"""FineWeb-Edu in GPT-2's vocabulary, streamed from the Hugging Face hub into shards of 100 million tokens.

    python prepare_fineweb.py                            # the 10-billion-token sample into data/fineweb-edu
    python prepare_fineweb.py --name sample-100BT --out data/fineweb-edu-100B

The first shard is for validation, the rest for training; a document that does not fit goes on in the next
shard. Each document is followed by an end-of-text id. The preparation that Inheritune's authors built on puts
it in front of each document instead, so its shards differ from ours by one token at either end. Killed
anywhere, it goes on when started again.
"""

import itertools
import sys

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.data.sources import open_files, open_hub, parse_corpus
from inheritune.data.tokenizer import load_tokenizer
from inheritune.data.writer import BinWriter, write_tokens

DOCUMENTS = {
    "sample-10BT": 9.67e6,
    "sample-100BT": 97.3e6,
}  # roughly; only the remaining time follows from them


@one_line
def main(argv=None):
    """Command line: FineWeb-Edu, from the hub or from local files, into a data folder of shards."""
    parser = Parser(description=__doc__)
    parser.add_argument("--name", default="sample-10BT", help="which part: sample-10BT, sample-100BT, ...")
    parser.add_argument("--shard_tokens", type=int, default=10**8, help="tokens in each file but the last")
    parser.add_argument("--max_tokens", type=int, default=0, help="stop after so many tokens; 0: at the end")
    args = parse_corpus(parser, argv, out="data/fineweb-edu", dataset="HuggingFaceFW/fineweb-edu")
    if args.shard_tokens < 1:
        raise UserError(f"--shard_tokens {args.shard_tokens} must be at least 1")
    if args.max_tokens and args.max_tokens <= args.shard_tokens:
        shard = f"--shard_tokens {args.shard_tokens}"
        raise UserError(f"--max_tokens {args.max_tokens} leaves nothing to train on; it must exceed {shard}")
    tokenizer = load_tokenizer(args.tokenizer)
    if args.data_files:
        source = open_files(args.data_files, args.text_column, args.split_on)
    else:
        which = {"name": args.name, "revision": args.revision}
        source = open_hub(args.dataset, True, args.text_column, DOCUMENTS.get(args.name), **which)
    arguments = source.arguments | {"text_column": args.text_column}
    arguments |= {"shard_tokens": args.shard_tokens, "max_tokens": args.max_tokens}

    names = itertools.chain(["val_000000.bin"], (f"train_{i:06d}.bin" for i in itertools.count()))
    limits = {"shard_tokens": args.shard_tokens, "max_tokens": args.max_tokens or sys.maxsize}
    with BinWriter(args.out, "prepare_fineweb.py", arguments, tokenizer, {"all": names}, **limits) as writer:
        if writer.open():
            write_tokens(writer, source.pieces, lambda i: "all", args.num_proc)


if __name__ == "__main__":
    main()
