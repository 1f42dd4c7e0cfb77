"""FineWeb-Edu in GPT-2's vocabulary, streamed from the Hugging Face hub into shards of 100 million tokens.

    python prepare_fineweb.py                            # the 10-billion-token sample into data/fineweb-edu
    python prepare_fineweb.py --name sample-100BT --out data/fineweb-edu-100B

The first shard is for validation, the rest for training; a shard ends some documents after it is full. Each
document is followed by an end-of-text id. The preparation that Inheritune's authors built on puts it in front
of each document instead. Killed anywhere, it goes on when started again.
"""

import sys

from inheritune.base.errors import UserError, one_line
from inheritune.data.sources import hub_parser, open_corpus
from inheritune.data.tokenizer import load_tokenizer
from inheritune.data.writer import write_tokens


@one_line
def main(argv=None):
    """Command line: FineWeb-Edu, from the hub or from local files, into a data folder of shards."""
    parser = hub_parser(__doc__, "data/fineweb-edu", "HuggingFaceFW/fineweb-edu")
    name_help = "part of the dataset, such as sample-100BT (default: FineWeb-Edu's sample-10BT)"
    parser.add_argument("--name", help=name_help)
    parser.add_argument("--shard_tokens", type=int, default=10**8, help="tokens in a shard, about")
    parser.add_argument("--max_tokens", type=int, default=0, help="stop after about so many; 0: at the end")
    args = parser.parse_args(argv)
    if args.data_files and args.name:
        raise UserError("--name has no effect with --data_files: leave it out")
    if args.shard_tokens < 1:
        raise UserError(f"--shard_tokens {args.shard_tokens} must be at least 1")
    if args.max_tokens and args.max_tokens <= args.shard_tokens:
        shard = f"--shard_tokens {args.shard_tokens}"
        raise UserError(f"--max_tokens must exceed {shard}: the first shard is for validation")
    tokenizer = load_tokenizer(args.tokenizer)
    sample = "sample-10BT" if args.dataset == parser.get_default("dataset") else None
    source = open_corpus(args, True, name=args.name or sample)
    sizes = {"shard_tokens": args.shard_tokens, "max_tokens": args.max_tokens or sys.maxsize}
    source.arguments.update(sizes)
    write_tokens(args.out, "prepare_fineweb.py", source, tokenizer, args.num_proc, **sizes)


if __name__ == "__main__":
    main()
