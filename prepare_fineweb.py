"""FineWeb-Edu in GPT-2's vocabulary, streamed from the Hugging Face hub into shards of 100 million tokens.

    python prepare_fineweb.py                               # the 10-billion-token sample into data/fineweb_edu_10B
    python prepare_fineweb.py --name sample-100BT --out data/fineweb_edu_100B

The first shard is for validation, the rest for training; a document that does not fit goes on in the next shard.
Each document is followed by an end-of-text id. The preparation that Inheritune's authors built on puts it in front
of each document instead, so its shards differ from ours by one token at either end. Killed anywhere, it goes on
when started again.
"""

import functools
import itertools
import sys

from bins import UNSET, Stream, add_shared_flags, check_shared_flags, unfinished, write_tokens
from corpus import check_tables, find_files, fingerprint, load_hub, read_files, read_hub
from errors import Parser, UserError, one_line
from tokenizer import load_tokenizer

DOCUMENTS = {"sample-10BT": 9.67e6, "sample-100BT": 97.3e6}  # roughly; only the remaining time follows from them


@one_line
def main(argv=None):
    """Command line: FineWeb-Edu, from the hub or from local files, into a data folder of shards."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="data/fineweb_edu_10B", help="folder to write")
    dataset = "HuggingFaceFW/fineweb-edu"
    parser.add_argument("--dataset", default=dataset, help="hub dataset, or a local folder in the hub's layout")
    parser.add_argument("--name", default="sample-10BT", help="which part of it: sample-10BT, sample-100BT, ...")
    parser.add_argument("--revision", default="main", help="its branch or commit")
    parser.add_argument("--tokenizer", default="gpt2", help="a tiktoken name, bytes, or a .tiktoken ranks file")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens in each file but the last")
    parser.add_argument("--max_tokens", type=int, default=0, help="stop after so many tokens; 0: at the end")
    help = "read these instead of the hub: .parquet, .jsonl[.gz|.zst], .txt, folders or glob patterns"
    parser.add_argument("--data_files", nargs="+", metavar="PATH", help=help + UNSET)
    add_shared_flags(parser)
    args = parser.parse_args(argv)
    check_shared_flags(args)
    if args.shard_tokens < 1:
        raise UserError(f"--shard_tokens {args.shard_tokens} must be at least 1")
    if args.max_tokens and args.max_tokens <= args.shard_tokens:
        shard = f"--shard_tokens {args.shard_tokens}"
        raise UserError(f"--max_tokens {args.max_tokens} leaves nothing to train on; it must exceed {shard}")
    tokenizer = load_tokenizer(args.tokenizer)
    if args.data_files:
        files = find_files(args.data_files)
        check_tables(files, args.text_column)
        pieces = functools.partial(read_files, files, args.text_column)
        arguments = fingerprint(args.data_files, files)
    else:
        arguments = {"dataset": args.dataset, "name": args.name, "revision": args.revision}
        dataset = load_hub(args.dataset, True, args.text_column, name=args.name, revision=args.revision)
        pieces = functools.partial(read_hub, dataset, args.text_column, DOCUMENTS.get(args.name))
    arguments |= {"text_column": args.text_column}
    arguments |= {"shard_tokens": args.shard_tokens, "max_tokens": args.max_tokens}

    with unfinished(args.out, "prepare_fineweb.py", arguments, tokenizer) as progress:
        if progress is None:
            return
        names = itertools.chain(["val_000000.bin"], (f"train_{i:06d}.bin" for i in itertools.count()))
        stream = Stream(args.out, names, tokenizer, args.shard_tokens, args.max_tokens or sys.maxsize)
        write_tokens(progress, {"all": stream}, pieces, lambda i: "all", args.num_proc)


if __name__ == "__main__":
    main()
