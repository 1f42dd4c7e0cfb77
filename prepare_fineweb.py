"""FineWeb-Edu in GPT-2's vocabulary, streamed from the Hugging Face hub into shards of 100 million tokens.

    python prepare_fineweb.py                               # the 10-billion-token sample into data/fineweb_edu_10B
    python prepare_fineweb.py --name sample-100BT --out data/fineweb_edu_100B

The first shard is for validation, the rest for training; a document that does not fit goes on in the next shard.
Each document is followed by an end-of-text id. The preparation that Inheritune's authors built on puts it in front
of each document instead, so its shards differ from ours by one token at either end. Killed anywhere, it goes on
when started again.

Machines can share the work (parts.py): `--worker 0/8` to `--worker 7/8`, then `--join 8`. The hub's files (local
ones: their documents) are shared out; each worker begins a shard of its own, so its last one is shorter than the rest
and the limits between training shards lie elsewhere. The validation shard is a single machine's, byte for byte, and so
are the training shards when they are read one after the other, as data.py does.
"""

import functools
import itertools
import sys

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

SCRIPT = "prepare_fineweb.py"
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
    add_sharing_flags(parser)
    args = parser.parse_args(argv)
    check_shared_flags(args)
    if args.join is not None:
        check_join_flags(parser, args)
        join(args.out, args.join, SCRIPT)
        return
    if args.shard_tokens < 1:
        raise UserError(f"--shard_tokens {args.shard_tokens} must be at least 1")
    if args.max_tokens and args.max_tokens <= args.shard_tokens:
        shard = f"--shard_tokens {args.shard_tokens}"
        raise UserError(f"--max_tokens {args.max_tokens} leaves nothing to train on; it must exceed {shard}")
    if args.max_tokens and args.worker:
        raise UserError("--max_tokens counts from the corpus' first token, which a --worker does not see; leave it out")
    tokenise(args)


def tokenise(args):
    """The whole corpus, or one worker's part of it, into the folder that the arguments name."""
    tokenizer = load_tokenizer(args.tokenizer)
    pieces, arguments, at, documents = open_files(args) if args.data_files else open_hub(args)
    arguments |= {"text_column": args.text_column}
    arguments |= {"shard_tokens": args.shard_tokens, "max_tokens": args.max_tokens}
    out, first = args.out, True
    if args.worker:
        out, arguments = part_of(args.out, args.worker, arguments)
        first = args.worker.i == 0

    with unfinished(out, SCRIPT, arguments, tokenizer, at, documents.start if documents else 0) as progress:
        if progress is None:
            return
        if documents is not None:
            pieces = functools.partial(within, documents, progress["documents"], pieces)
        names = itertools.chain(["val_000000.bin"] if first else [], (f"train_{i:06d}.bin" for i in itertools.count()))
        stream = Stream(out, names, tokenizer, args.shard_tokens, args.max_tokens or sys.maxsize)
        needed = ("train", "val") if first else ()  # with a token for train, the shard before it is whole
        write_tokens(progress, {"all": stream}, pieces, lambda i: "all", args.num_proc, needed)


def open_files(args):
    """(Pieces from a position on, what tells this input from another, the position to begin at, the numbers of the
    documents to take or None for all) of local files."""
    files = find_files(args.data_files)
    check_tables(files, args.text_column)
    pieces = functools.partial(read_files, files, args.text_column)
    at, documents = (0, 0), None
    if args.worker:
        counts = count_documents(files, args.text_column)
        documents = share(sum(counts), args.worker)
        at = place_of(documents.start, counts)
    return pieces, fingerprint(args.data_files, files), at, documents


def open_hub(args):
    """The same of a hub dataset, streamed. A worker has its share of the dataset's files."""
    dataset = load_hub(args.dataset, True, args.text_column, name=args.name, revision=args.revision)
    n = DOCUMENTS.get(args.name)
    if args.worker:
        i, workers = args.worker
        if workers > dataset.num_shards:
            raise UserError(f"{args.dataset} has {dataset.num_shards} files to share, too few for {workers} workers")
        dataset = dataset.shard(workers, i, contiguous=True)
        n = n and n / workers
    pieces = functools.partial(read_hub, dataset, args.text_column, n)
    return pieces, {"dataset": args.dataset, "name": args.name, "revision": args.revision}, (0, 0), None


if __name__ == "__main__":
    main()
