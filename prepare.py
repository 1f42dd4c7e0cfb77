"""Turn text into the token files that train.py reads: your own files and URLs, or the English in every Python.

    python prepare.py                                   # 2.4 MB of Python's documentation as bytes -> data/pydocs
    python prepare.py book.txt notes/ --out data/mine   # your text in GPT-2's vocabulary

Kill a run anywhere and start it again: it goes on, and the result is the same to the last bit (bins.py says how).
"""

import functools
import hashlib
import os
import platform
import urllib.parse

from tqdm import tqdm

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.base.files import replacing
from inheritune.data.sources import (
    TABLES,
    TEXT,
    File,
    by_hash,
    check_tables,
    count_documents,
    find_files,
    fingerprint,
    held_out,
    python_documentation,
    python_sources,
    read_files,
    read_texts,
)
from inheritune.data.tokenizer import load_tokenizer
from inheritune.data.writer import UNSET, Stream, add_shared_flags, check_shared_flags, unfinished, write_tokens

MAX_DOWNLOAD = 20 << 30  # bytes of one URL


@one_line
def main(argv=None):
    """Command line: text of any kind, or the embedded corpus, into a data folder."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="PATH|URL",
        help="text files, each one document; .jsonl[.gz|.zst] and .parquet files, each line or row one document; "
        f"folders, searched for {' '.join(TEXT + TABLES)}; glob patterns; https URLs of such files, up to "
        f"{MAX_DOWNLOAD >> 30} GiB each. Without any: --corpus" + UNSET,
    )
    help = (
        "without PATH: docs, the documentation inside this Python, or python, its standard library's source files too"
    )
    parser.add_argument("--corpus", choices=("docs", "python"), default="docs", help=help)
    help = "bytes, a tiktoken name or the path of a .tiktoken ranks file (default: gpt2; without PATH bytes)"
    parser.add_argument("--tokenizer", help=help + UNSET)
    parser.add_argument("--out", help="folder to write (default without PATH: data/pydocs, or data/python)" + UNSET)
    help = "share of the documents, from the end, for validation; of the bytes if there is one text file only"
    parser.add_argument("--val_fraction", type=float, default=0.1, help=help)
    add_shared_flags(parser)
    args = parser.parse_args(argv)
    check_shared_flags(args)
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction} must lie between 0 and 1")
    if args.sources and not args.out:
        raise UserError("say where to write with --out, for example --out data/mine")
    if args.sources and args.corpus != "docs":
        raise UserError("--corpus says what to take without a PATH: leave one of the two out")
    out = args.out or {"docs": "data/pydocs", "python": "data/python"}[args.corpus]
    tokenizer = load_tokenizer(args.tokenizer or ("gpt2" if args.sources else "bytes"))

    urls = [check_url(source) for source in args.sources if is_url(source)]
    paths = [source for source in args.sources if not is_url(source)]
    arguments = {"val_fraction": args.val_fraction, "text_column": args.text_column}
    if args.sources:
        files = find_files(paths)
        check_tables(files, args.text_column)
        arguments |= fingerprint(paths, files) | {"urls": [shown(url) for url in urls]}
    else:
        what = {"docs": "documentation inside", "python": "documentation and the source files of"}[args.corpus]
        arguments |= {"sources": f"the {what} Python {platform.python_version()}"}

    with unfinished(out, "prepare.py", arguments, tokenizer) as progress:
        if progress is None:
            return
        if args.sources:
            files = find_files([download(s, out) if is_url(s) else s for s in args.sources])
            n = sum(count_documents(files, args.text_column))
            if n == 1 and not files[0].path.endswith(TABLES):
                files, n = cut_in_two(files[0], args.val_fraction), 2
            pieces = functools.partial(read_files, files, args.text_column)
        else:
            documents = python_documentation()
            texts = by_hash(documents)
            if args.corpus == "python":  # a module's documentation and its source have one name, and so one split
                documents = sorted(documents + python_sources(), key=lambda d: hashlib.sha256(d[0].encode()).digest())
                texts = [text for _, text in documents]
            pieces, n = functools.partial(read_texts, texts), len(texts)
        if n < 2:
            raise UserError(f"{n} documents cannot be parted into training and validation; give more")
        n_train = min(max(1, n - round(n * args.val_fraction)), n - 1)
        split_of = [("val" if i >= n_train else "train") for i in range(n)]
        if not args.sources and args.corpus == "python":
            split_of = [("val" if held_out(name) else "train") for name, _ in documents]
        streams = {split: Stream(out, [f"{split}.bin"], tokenizer) for split in ("train", "val")}
        write_tokens(progress, streams, pieces, split_of.__getitem__, args.num_proc)


def cut_in_two(file, val_fraction):
    """A text file as two `File`s, the second of about `val_fraction` of its bytes, parted between characters."""
    cut = round(file.stop * (1 - val_fraction))
    with open(file.path, "rb") as f:
        f.seek(cut)
        while (f.read(1) or b"a")[0] & 0xC0 == 0x80:  # in the middle of a character
            cut += 1
    if not 0 < cut < file.stop:
        raise UserError(f"{file.path} is too short to part into training and validation; give more text")
    return [File(file.path, 0, cut), File(file.path, cut, file.stop)]


def is_url(source):
    return "://" in source


def check_url(url):
    """Give `url` back if we would fetch it. What it carries besides host and path is neither shown nor stored."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise UserError(f"{shown(url)}: only https:// URLs are fetched; download it yourself, give the file")
    if parts.username or parts.password:
        raise UserError(f"{shown(url)}: a URL with a password is not fetched; download it yourself")
    return url


def shown(url):
    """`url` as it may be printed and stored: without user and password, and its query, if any, as a hash."""
    parts = urllib.parse.urlsplit(url)
    query = f"?{hashlib.sha256(parts.query.encode()).hexdigest()[:12]}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"


def download(url, out):
    """Fetch `url` into `out`/download unless it is there already, and return the file's path.

    The folder goes when the tokens are complete. Raises UserError when there is no answer, or too long a one.
    """
    import requests

    name = os.path.basename(urllib.parse.urlsplit(url).path) or "index.txt"
    folder = os.path.join(out, "download")
    path = os.path.join(folder, f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}")
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    try:
        with requests.get(url, stream=True, timeout=30) as response, replacing(path) as f:
            if not response.ok or not response.url.startswith("https://"):
                answer = f"status {response.status_code}" if not response.ok else "a redirect away from https"
                raise UserError(f"{shown(url)} answered with {answer}; check the address")
            size = int(response.headers.get("content-length", 0)) or None
            with tqdm(desc=name, total=size, unit="B", unit_scale=True) as bar:
                for block in response.iter_content(1 << 20):
                    bar.update(len(block))
                    if bar.n > MAX_DOWNLOAD:
                        limit = f"{MAX_DOWNLOAD >> 30} GiB"
                        raise UserError(f"{shown(url)} has over {limit}; download it yourself")
                    f.write(block)
    except requests.RequestException as e:  # its text may hold the query, so only its kind is shown
        why = type(e).__name__
        raise UserError(f"{shown(url)} could not be fetched ({why}); check address and network") from None
    return path


if __name__ == "__main__":
    main()
