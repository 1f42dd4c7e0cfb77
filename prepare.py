"""Turn text into the token files that train.py reads: your files, or Python's own code and docs.

    python prepare.py                                  # Python's code and docs, 12 MB as bytes -> data/python
    python prepare.py book.txt notes/ --out data/mine  # your text in GPT-2's vocabulary

Kill a run anywhere and start it again: it goes on, and the result is the same to the last bit
(inheritune/data/writer.py says how).
"""

from inheritune.base.cpus import usable_cpus
from inheritune.base.errors import Parser, UserError, one_line
from inheritune.data.sources import TOKENIZERS, open_files
from inheritune.data.standard_library import open_python
from inheritune.data.text_files import TABLES, TEXT
from inheritune.data.tokenizer import load_tokenizer
from inheritune.data.writer import write_tokens


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    kinds = f"text files ({' '.join(TEXT)}), each one document; tables ({' '.join(TABLES)}), each row one"
    others = "folders of them; text, JSON and CSV also as .gz and .zst. Without PATH: Python's code and docs"
    add("sources", nargs="*", metavar="PATH", help=f"{kinds}; {others}")
    add("--out", help="folder to write (default without PATH: data/python)")
    add("--tokenizer", help=f"{TOKENIZERS} (default: gpt2; without PATH bytes)")
    help = "validation files (default: the folder's own validation split, else --val_fraction of all text)"
    add("--val_files", nargs="+", default=[], metavar="PATH", help=help)
    help = "share of the tokens, from the end, used for validation (default: 0.1)"
    add("--val_fraction", type=float, help=help)
    add("--text_column", help="where a table keeps the text (default: text)")
    help = "separator between the documents of a text file: '<|endoftext|>', or $'\\n\\n' for empty lines"
    add("--split_on", default="", metavar="TEXT", help=help)
    add("--num_proc", type=int, default=usable_cpus(), help="threads that tokenise")
    return parser


@one_line
def main(argv=None):
    """Command line: files of text, or Python's own code and docs, into a data folder."""
    args = make_parser().parse_args(argv)
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction} must lie between 0 and 1")
    if args.sources:
        if not args.out:
            raise UserError("say where to write with --out, for example --out data/mine")
        source = open_files(
            args.sources, args.val_files, not args.val_files, args.text_column, args.split_on, args.out
        )
    else:
        for name in ("val_files", "val_fraction", "text_column", "split_on"):
            if getattr(args, name):
                raise UserError(f"--{name} is for files: name some, or leave it out")
        source = open_python()
    if source.has_val and args.val_fraction:
        raise UserError("--val_fraction has no effect where validation text is given: leave it out")
    fraction = None if source.has_val else args.val_fraction or 0.1
    source.arguments["val_fraction"] = fraction  # decides what the folder holds, as the files do
    tokenizer = load_tokenizer(args.tokenizer or ("gpt2" if args.sources else "bytes"))
    write_tokens(args.out or "data/python", "prepare.py", source, tokenizer, args.num_proc, fraction)


if __name__ == "__main__":
    main()
