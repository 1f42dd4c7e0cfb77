"""Inherit: make a smaller model out of blocks of a larger one (paper, Algorithm 1, step 2).

    python inherit.py --ckpt gpt2-large --layers 18 --out out-gpt2-large-18
    python inherit.py --ckpt gpt2-large --layers auto --data data/openwebtext --out small
    python inherit.py --ckpt HuggingFaceTB/SmolLM2-135M --blocks 0-9,25-29 --out small

The new model has the chosen blocks, renumbered, and everything that is in no block of the larger one: for a
GPT-2 the token and position embeddings, the final LayerNorm and the tied head. (The authors' released script
leaves positions and final LayerNorm random, as --released_slice does.) The paper's other initialisations are
--recipe, --parts and --layernorms; inheritune/models/initialisations.py says what each one is.
"""

import argparse
import dataclasses
import re

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.base.files import refuse_existing
from inheritune.experiments.attention_metrics import choose_for
from inheritune.models.initialisations import PARTS, RECIPES, Recipe, make_checkpoint
from inheritune.weights import checkpoint

RECIPE_HELP = (
    "which k blocks (--layers k): first, last or middle k; alternate: 0, 2, 4, …; first_plus_last: first k-1 "
    "and the last; "
    "ends: first and last k/2; stack: the whole model, twice; hybrid: first k/2, twice; random: random init; "
    "half_width (no --layers): all blocks, half their heads and channels"
)


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(description="Make a smaller checkpoint out of a larger one.")
    add = parser.add_argument
    add("--ckpt", required=True, help="the larger model: checkpoint, run folder or Hugging Face id")
    add("--out", required=True, help="folder to create")
    auto = "the half with the highest block influence (1 - cosine of input and output; needs --data)"
    add("--layers", help=f"how many blocks, or auto: {auto}")
    add("--data", help="data folder on whose validation split --layers auto measures the blocks")
    add("--blocks", help="keep these blocks instead, e.g. 0-11,23")
    add("--onto", help="a smaller trained checkpoint to grow: its blocks, then --ckpt's up to --layers")
    add("--recipe", choices=RECIPES, default="first", help=RECIPE_HELP)
    add("--parts", choices=PARTS, default="all", help="take only these parts of each block")
    add("--layernorms", type=true_or_false, default=True, help="take the blocks' LayerNorms too")
    add("--released_slice", action="store_true", help="blocks and wte only, as the authors did")
    add("--seed", type=int, default=1337, help="of whatever is random")
    return parser


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")
    return text.lower() == "true"


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    auto = args.layers == "auto"
    if args.blocks and (args.layers is not None or args.onto or args.recipe != "first"):
        raise UserError("--blocks says which blocks: leave out --layers, --onto and --recipe")
    if not args.blocks and args.recipe != "half_width" and args.layers is None:
        onto = "--onto needs --layers K, the new depth"
        raise UserError(onto if args.onto else "give --layers K or --blocks LIST")
    if args.onto and recipe_of(args) != Recipe(seed=args.seed):
        flags = "--recipe, --parts, --layernorms, --released_slice"
        raise UserError(f"--onto takes whole blocks: leave out {flags}")
    if args.recipe == "random" and recipe_of(args) != Recipe("random", seed=args.seed):
        raise UserError("--recipe random takes nothing: leave out --parts, --layernorms, --released_slice")
    if auto != (args.data is not None):
        raise UserError("--layers auto and --data FOLDER go together: the data that the choice is made on")
    if auto and (args.recipe != "first" or args.onto):
        raise UserError("--layers auto chooses the blocks: leave out --recipe and --onto")
    if not -(2**63) <= args.seed < 2**64:
        raise UserError(f"--seed must be a number of 64 bits, not {args.seed}")
    if args.layers is not None and not auto and not (args.layers.isdecimal() and int(args.layers)):
        raise UserError(f"--layers must be a whole number from 1 on, or auto, not {args.layers!r}")


def recipe_of(args: argparse.Namespace) -> Recipe:
    return Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})


def parse_blocks(text: str) -> list[int]:
    """`0-2,23` → [0, 1, 2, 23]. Raises UserError."""
    blocks = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        numbers = match and range(int(match[1]), int(match[2] or match[1]) + 1)
        if not numbers:
            what = f"{part!r} is not a number or a range"
            raise UserError(f"--blocks {text!r}: {what}; write them like 0-11,23")
        blocks += numbers
    return blocks


@one_line
def main(argv=None):
    """Command line: make a new checkpoint folder out of another."""
    args = make_parser().parse_args(argv)
    check_flags(args)
    folder = checkpoint.find(args.ckpt, weights=args.recipe != "random")
    blocks = parse_blocks(args.blocks) if args.blocks else None
    layers, notes = None, {}
    if args.layers == "auto":
        refuse_existing(args.out)  # before the choice, which takes a while
        blocks, reason = choose_for(folder, args.data)
        print(f"blocks {', '.join(map(str, blocks))}: {reason}", flush=True)
        notes = {"layers_auto": reason}
    elif args.layers:
        layers = int(args.layers)
    onto = checkpoint.find(args.onto) if args.onto else None
    made = make_checkpoint(folder, args.out, layers, blocks, onto, notes, **vars(recipe_of(args)))
    print(f"{made}\ntrain it with\n  python train.py --init_from={args.out} …")


if __name__ == "__main__":
    main()
