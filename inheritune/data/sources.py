"""Where text comes from: files, folders, the Hugging Face hub.

A document is a text file (or a part of one, see --split_on), or a row of a table or of a hub dataset. What is
read at a time is a `Piece` (text_files.py): some documents, or a part of a long one.
"""

import collections
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from inheritune.base.cpus import usable_cpus
from inheritune.base.errors import Parser, UserError, first_line
from inheritune.data.text_files import (
    TABLES,
    TEXT,
    File,
    Piece,
    check_column,
    examine,
    holds,
    is_text,
    named_kind,
    read_table,
    read_text,
    say_left_out,
)

# Words in a path that mark text as validation or test, as in the hub's rules.
HELD_OUT = re.compile(r"(?i)(?<![a-z])(valid|validation|val|dev|test|testing|eval|evaluation)(?![a-z])")
NOT_TEXT = re.compile(r"(?i)(readme|licen[cs]e|notice|copying|citation|changelog)\b")
TOKENIZERS = "bytes, a tiktoken name, or the path of a tokenizer.json or of its folder"
METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "index.json")


class Source(NamedTuple):
    """A corpus, opened."""

    arguments: dict  # identify the corpus; stored in meta.json
    pieces: Iterator[Piece]
    has_val: bool = False  # does some of it have the split "val"?
    documents: Callable[[], int] | None = None  # how many there are; may take as long as reading them


# Files


def open_files(
    paths: list[str], val_paths: list[str], own_val: bool, column: str | None, split_on: str, out: str
) -> Source:
    """Files and folders as a Source.

    val_paths: validation files
    own_val: whether to take a folder's own validation split; if not, a folder that has one is refused
    column: where tables keep the text; None: "text"
    split_on: what separates the documents of a text file; "": nothing
    out: the folder that will be written, which may not lie in one that is read
    """
    files = []
    for split, path in [*(("train", path) for path in paths), *(("val", path) for path in val_paths)]:
        real = os.path.realpath(path)
        if os.path.isdir(path) and os.path.commonpath([real, os.path.realpath(out)]) == real:
            raise UserError(f"--out {out} lies in {path}, which is read: choose a folder outside of it")
        found = find_files(path, split)
        if "val" in found and split == "train" and not own_val:
            why = "holds validation text of its own, which has no use here: name its training files"
            raise UserError(f"{path} {why}")
        files += [(split, examine(name)) for split, names in found.items() for name in names]
    names = collections.Counter(os.path.abspath(file.path) for _, file in files)
    if twice := [name for name, n in names.items() if n > 1]:
        raise UserError(f"{twice[0]} is given twice; name each file once")
    check_options([file for _, file in files], column, split_on)
    # the files are identified by size and sampled content, not by path
    listing = json.dumps([(split, file.size, file.sample) for split, file in files])
    column = column or "text"
    arguments = {"sources": [*paths, *val_paths], "text_column": column, "split_on": split_on}
    arguments |= {"files": len(files), "bytes": sum(file.size for _, file in files)}
    arguments["content_sha256"] = hashlib.sha256(listing.encode()).hexdigest()

    def count() -> int:
        return sum(len(piece.texts) - 1 + piece.end for piece in read_pieces(files, column, split_on))

    has_val = any(split == "val" for split, _ in files)
    return Source(arguments, read_pieces(files, column, split_on), has_val, count)


def check_options(files: list[File], column: str | None, split_on: str) -> None:
    """Raise UserError for an option that has no effect on these files, or a column that a table lacks."""
    texts = [file for file in files if file.kind == "text"]
    tables = [file for file in files if file.kind != "text"]
    if column and not tables:
        raise UserError("--text_column says where a table keeps the text, but there are text files only")
    if split_on and not texts:
        raise UserError("--split_on separates the documents of text files, but there are tables only")
    if split_on and not any(holds(file, split_on) for file in texts):
        where = f"nowhere in the text files, such as {texts[0].path}"
        cure = f"; a line end is written $'{split_on}', with the $" if "\\" in split_on else ""
        raise UserError(f"--split_on {split_on!r} stands {where}{cure}")
    for file in tables:
        next(read_table(file, column or "text"), None)


def find_files(path: str, split: str) -> dict[str, list[str]]:
    """{split: paths of the files} that `path` stands for.

    split: "train" or "val", what the user gave the path for

    A file stands for itself, a folder for the text files and tables under it (sorted; names that start with a
    dot are left out). stderr says what else is left out. Raises UserError where nothing is found.
    """
    if os.path.isfile(path):
        return {split: [path]}
    if "://" in path:  # (which may hold a password, so it is not shown)
        raise UserError("a URL is not fetched: download it (curl -LO URL) and give the file")
    if not os.path.isdir(path):
        what = (
            "is a pipe or a device, which cannot be read twice" if os.path.lexists(path) else "does not exist"
        )
        raise UserError(f"{path} {what}; give text files, tables or folders of them")
    folder, names, left = path, [], collections.Counter()
    for name in files_under(folder):
        suffix = os.path.splitext(name)[1].lower()
        if not os.path.isfile(name):
            left["no regular file"] += 1  # a pipe would be waited for
        elif not suffix or named_kind(name).kind is None:
            left[suffix or "without a suffix"] += 1
        elif os.path.basename(name) in METADATA:
            left["metadata"] += 1
        else:
            names.append(name)
    found = {split: names}
    held_out = any(HELD_OUT.search(os.path.relpath(name, folder)) for name in names)
    if split == "train" and (held_out or card_names_files(folder)):
        splits = hub_splits(folder, names)
        found = {"train": splits.pop("train"), "val": splits.pop("validation", [])}
        left |= {f"of the split {name}": len(paths) for name, paths in splits.items()}
        listed = {path for paths in [*found.values(), *splits.values()] for path in paths}
        left["of no split"] = len({os.path.abspath(name) for name in names} - listed)
    elif any(named_kind(name).kind != "text" for name in names):
        # READMEs and licences beside tables are not training text
        found[split] = [
            n for n in names if named_kind(n).kind != "text" or not NOT_TEXT.match(os.path.basename(n))
        ]
        left["cards and licences"] = len(names) - len(found[split])
    if total := sum(left.values()):
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(left.items()) if n)
        print(f"{folder}: {total} files left out ({kinds})", file=sys.stderr)
    if not found[split]:
        raise UserError(f"{folder} holds no {', '.join(TEXT + TABLES)}")
    return {split: paths for split, paths in found.items() if paths}


def files_under(folder: str, skip: tuple = ()) -> Iterator[str]:
    """Yield the paths of the files under `folder`, hidden ones left out, always in one order. Links to
    folders are followed, and each folder is visited once. Raises OSError where one cannot be listed."""
    seen = {os.path.realpath(folder)}

    def is_new(path):
        real = os.path.realpath(path)
        new = real not in seen
        seen.add(real)
        return new

    def fail(error):
        raise error

    for here, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in skip)
        folders[:] = [f for f in folders if is_new(os.path.join(here, f))]
        yield from (os.path.join(here, name) for name in sorted(names) if not name.startswith("."))


def card_names_files(folder: str) -> bool:
    """Whether the card of a data set in the hub's layout says which files are which split."""
    path = os.path.join(folder, "README.md")
    if not os.path.isfile(path):
        return False
    with open(path, encoding="utf-8", errors="replace") as f:
        head = f.read(1 << 16)
    return head.startswith("---") and "data_files:" in head[3:].partition("\n---")[0]


def hub_splits(folder: str, names: list[str]) -> dict[str, list[str]]:
    """{split: paths} of a folder in the hub's layout, by the hub library's own rules: the names of its files
    and folders, or its card. Raises UserError where they do not say which of `names` are for training."""
    import datasets

    datasets.logging.set_verbosity_error()
    try:
        files = datasets.load_dataset_builder(os.path.abspath(folder)).config.data_files or {}
    except Exception as e:  # there is no common class
        print(f"{folder} is no data set in the hub's layout ({first_line(e)})", file=sys.stderr)
        files = {}
    found = {str(split): list(map(str, paths)) for split, paths in files.items()}
    for name in found.get("train", names):
        name = os.path.relpath(name, folder)
        if word := HELD_OUT.search(name):
            cure = "name the training files yourself, and what is for validation with --val_files"
            raise UserError(f"{folder}: {name} says {word[0]}; {cure}")
    if found and "train" not in found:
        raise UserError(f"{folder} names files for {', '.join(found)}, none for train: name them yourself")
    return found or {"train": list(map(os.path.abspath, names))}


def read_pieces(files: list[tuple[str, File]], column: str, split_on: str) -> Iterator[Piece]:
    """Yield the pieces of [(split, file)] in order. Raises UserError for anything broken."""
    total, before = sum(file.size for _, file in files) or 1, 0
    for split, file in files:
        for piece in read_text(file, split_on) if file.kind == "text" else read_table(file, column):
            yield piece._replace(split=split, progress=(before + piece.progress * file.size) / total)
        before += file.size


# The Hugging Face hub


def hub_parser(description: str, out: str, dataset: str) -> Parser:
    """The flags of the commands that read a hub dataset; `out` and `dataset` are defaults."""
    parser = Parser(description=description)
    parser.add_argument("--out", default=out, help="folder to write")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--dataset", default=dataset, help="hub dataset, or a folder in the hub's layout")
    help = "read these instead: tables, text files or folders of them, as prepare.py does"
    one.add_argument("--data_files", nargs="+", default=[], metavar="PATH", help=help)
    parser.add_argument("--tokenizer", default="gpt2", help=TOKENIZERS)
    parser.add_argument("--num_proc", type=int, default=usable_cpus(), help="threads that tokenise")
    return parser


def open_corpus(args, streaming: bool, **options) -> Source:
    """What the flags of `hub_parser` name: --data_files, or the column `text` of the `train` split of a hub
    dataset (or of a folder in the hub's layout).

    options: revision and name, for `datasets.load_dataset`

    Raises UserError, after the hub library's own 20 seconds of trying again, when the hub cannot be reached,
    and when it refuses or there is no such column.
    """
    if args.data_files:
        return open_files(args.data_files, [], False, None, "", args.out)
    import datasets
    from huggingface_hub.utils import logging

    dataset = args.dataset
    logging.set_verbosity_error()  # it would report every attempt
    print(f"asking the Hugging Face hub for {dataset} ...", file=sys.stderr)
    try:
        found = datasets.load_dataset(dataset, split="train", streaming=streaming, **options)
    except Exception as e:  # there is no common class, and every one of them means this
        cure = "check the network, point HF_HOME at a filled cache, or give local files with --data_files"
        raise UserError(f"{dataset} could not be loaded ({first_line(e)}); {cure}") from e
    if found.column_names:
        check_column("text", found.column_names, dataset)
    rows, n = found.select_columns(["text"]), None if streaming else len(found)
    return Source({"dataset": dataset} | options, read_hub(rows, n), documents=lambda: n)


def read_hub(rows, n: int | None) -> Iterator[Piece]:
    """Yield a piece for each of the `n` rows of a hub dataset; n is None for a streamed one."""
    nulls = 0
    try:
        for number, row in enumerate(rows, 1):
            if is_text(row["text"], "text", f"row {number} of the dataset"):
                yield Piece([row["text"]], progress=n and number / n)
            else:
                nulls += 1
        say_left_out(nulls, "the dataset")
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"reading from the hub failed ({first_line(e)}); run again to go on") from e
