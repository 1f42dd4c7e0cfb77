"""Turn text into the token files that train.py reads: your files and URLs, or the text in every Python.

    python prepare.py                                  # the text inside Python, 12 MB as bytes -> data/python
    python prepare.py book.txt notes/ --out data/mine  # your text in GPT-2's vocabulary

Kill a run anywhere and start it again: it goes on, and the result is the same to the last bit
(inheritune/data/writer.py says how).
"""

import functools
import hashlib
import os
import platform
import urllib.parse
from argparse import Namespace

from tqdm import tqdm

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.base.files import replacing
from inheritune.data import sources
from inheritune.data.sources import UNSET
from inheritune.data.text_files import TABLES, TEXT, cut_in_two, is_text
from inheritune.data.tokenizer import load_tokenizer
from inheritune.data.writer import BinWriter, write_tokens

MAX_DOWNLOAD = 20 << 30  # bytes of one URL
CORPORA = {  # --corpus: (where it goes, what it is)
    "python": ("data/python", "the documentation and the source files of"),
    "docs": ("data/pydocs", "the documentation inside"),
}


def parse(argv: list[str] | None) -> Namespace:
    """The command line's arguments, checked."""
    parser = Parser(description=__doc__)
    help = (
        f"text files, each one document; tables ({' '.join(TABLES)}), a row a document; also as .gz, .zst; "
        f"folders, searched for {' '.join(TEXT + TABLES)}; glob patterns; https URLs of such files, up to "
        f"{MAX_DOWNLOAD >> 30} GiB each. Without any: --corpus"
    )
    parser.add_argument("sources", nargs="*", metavar="PATH|URL", help=help + UNSET)
    help = "without PATH: python, documentation and source files in this Python, or docs, the former alone"
    parser.add_argument("--corpus", choices=CORPORA, help=help + " (default: python)" + UNSET)
    help = "bytes, a tiktoken name, or the path of a tokenizer.json or of a folder that holds one"
    parser.add_argument("--tokenizer", help=help + " (default: gpt2; without PATH bytes)" + UNSET)
    help = "folder to write (default without PATH: data/python, or data/pydocs)"
    parser.add_argument("--out", help=help + UNSET)
    help = "share of the documents, from the end, for validation; of the bytes if there is one text file only"
    parser.add_argument("--val_fraction", type=float, default=0.1, help=help)
    sources.add_shared_flags(parser)
    args = parser.parse_args(argv)
    sources.check_shared_flags(args, args.sources)
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction} must lie between 0 and 1")
    if args.sources and not args.out:
        raise UserError("say where to write with --out, for example --out data/mine")
    if args.sources and args.corpus:
        raise UserError("--corpus says what to take without a PATH: leave one of the two out")
    args.corpus = args.corpus or "python"
    args.out = args.out or CORPORA[args.corpus][0]
    args.tokenizer = args.tokenizer or ("gpt2" if args.sources else "bytes")
    return args


def describe(args: Namespace) -> dict:
    """What tells the input of this run from another, for meta.json, without fetching anything."""
    arguments = {"val_fraction": args.val_fraction, "text_column": args.text_column}
    if not args.sources:
        return arguments | {"sources": f"{CORPORA[args.corpus][1]} Python {platform.python_version()}"}
    urls = [shown(check_url(source)) for source in args.sources if is_url(source)]
    paths = [source for source in args.sources if not is_url(source)]
    found = sources.open_files(paths, args.text_column, args.split_on)
    return arguments | found.arguments | {"urls": urls}


def open_sources(args: Namespace) -> tuple:
    """(pieces from a position on, the split of each document) of the files and URLs given."""
    files = sources.find_files([download(s, args.out) if is_url(s) else s for s in args.sources])
    n = sources.count_documents(files, args.text_column, args.split_on)
    if n == 1 and is_text(files[0].path):
        files, n = cut_in_two(files[0].path, args.val_fraction), 2
    pieces = functools.partial(sources.read_files, files, args.text_column, args.split_on)
    return pieces, last_for_validation(n, args.val_fraction)


def open_corpus(args: Namespace) -> tuple:
    """The same of an embedded corpus."""
    documents = sources.python_documentation()
    if args.corpus == "docs":
        texts = sources.by_hash(documents)
        split_of = last_for_validation(len(texts), args.val_fraction)
    else:  # a module's documentation and its source have one name, and so one split
        documents += sources.python_sources()
        documents.sort(key=lambda document: hashlib.sha256(document[0].encode()).digest())
        texts = [text for _, text in documents]
        split_of = ["val" if sources.held_out(name) else "train" for name, _ in documents]
    return functools.partial(sources.read_texts, texts), split_of


def last_for_validation(n: int, val_fraction: float) -> list[str]:
    """The split of each of n documents, at least one in each."""
    if n < 2:
        raise UserError(f"{n} documents cannot be parted into training and validation; give more")
    n_train = min(max(1, n - round(n * val_fraction)), n - 1)
    return ["train"] * n_train + ["val"] * (n - n_train)


# URLs


def is_url(source: str) -> bool:
    return "://" in source


def check_url(url: str) -> str:
    """Give `url` back if we would fetch it."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise UserError(f"{shown(url)}: only https:// URLs are fetched; download it yourself, give the file")
    if parts.username or parts.password:
        raise UserError(f"{shown(url)}: a URL with a password is not fetched; download it yourself")
    sources.check_known(parts.path)
    return url


def shown(url: str) -> str:
    """`url` as it may be printed and stored: without user and password, and its query, if any, as a hash."""
    parts = urllib.parse.urlsplit(url)
    query = f"?{hashlib.sha256(parts.query.encode()).hexdigest()[:12]}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"


def download(url: str, out: str) -> str:
    """Fetch `url` into `out`/download unless it is there already, and return the file's path.

    The folder goes when the tokens are complete. Raises UserError when there is no answer, or too long a one.
    """
    import requests

    name = os.path.basename(urllib.parse.urlsplit(url).path) or "index.txt"
    path = os.path.join(out, "download", f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}")
    if os.path.exists(path):
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    bar = tqdm(desc=name, unit="B", unit_scale=True)
    try:
        with requests.get(url, stream=True, timeout=30) as response, replacing(path) as f, bar:
            if not response.ok or not response.url.startswith("https://"):
                answer = f"status {response.status_code}" if not response.ok else "a redirect away from https"
                raise UserError(f"{shown(url)} answered with {answer}; check the address")
            for block in response.iter_content(1 << 20):
                f.write(block)
                bar.update(len(block))
                if bar.n > MAX_DOWNLOAD:
                    raise UserError(f"{shown(url)} has over {MAX_DOWNLOAD >> 30} GiB; download it yourself")
    except requests.RequestException as e:  # its text may hold the query, so only its kind is shown
        why = type(e).__name__
        raise UserError(f"{shown(url)} could not be fetched ({why}); check address and network") from None
    return path


@one_line
def main(argv=None):
    """Command line: text of any kind, or the embedded corpus, into a data folder."""
    args = parse(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    with BinWriter(args.out, "prepare.py", describe(args), tokenizer) as writer:
        if writer.open():
            pieces, split_of = open_sources(args) if args.sources else open_corpus(args)
            write_tokens(writer, pieces, split_of.__getitem__, args.num_proc)


if __name__ == "__main__":
    main()
