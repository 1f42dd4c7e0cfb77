"""Inherit: make a smaller GPT out of the first blocks of a larger one (paper, Algorithm 1, step 2).

    python inherit.py --ckpt gpt2-large --layers 18 --out out-gpt2-large-18
    python inherit.py --ckpt gpt2-large --layers auto --data data/openwebtext --out small

The new model has the chosen blocks, renumbered, and the larger one's token and position embeddings, final
LayerNorm and tied head. (The authors' released script leaves positions and final LayerNorm random:
--released_slice does that.) The paper's other initialisations are --recipe, --parts and --layernorms;
initialisations.py says what each one is.
"""

import argparse
import dataclasses
import re

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.data.tokenizer import tokenizer_files
from inheritune.experiments.attention_metrics import choose_for
from inheritune.models.interface import open_config, open_weights
from inheritune.weights import checkpoint
from inheritune.weights.gpt2_format import is_other
from inheritune.weights.initialisations import (
    PARTS,
    RECIPES,
    Recipe,
    assemble,
    choose_blocks,
    make_checkpoint,
    write_inherited,
)
from model import GPT, GPTConfig

RECIPE_HELP = (
    "of --layers k: first, last or middle k; alternate: 0, 2, 4, …; first_plus_last: first k-1 and the last; "
    "ends: first and last k/2; stack: the whole model, twice; hybrid: first k/2, twice; random: random init; "
    "without --layers half_width: all blocks, half their heads and channels"
)


def make_parser() -> Parser:
    parser = Parser(description="Make a smaller GPT checkpoint out of a larger one.")
    add = parser.add_argument
    add("--ckpt", required=True, help="the larger model: checkpoint, run folder or Hugging Face id")
    add("--out", required=True, help="folder to create")
    add("--layers", help="how many blocks, or auto: the half that changes most (needs --data)")
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


def check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    if args.blocks and (args.layers is not None or args.onto or args.recipe != "first"):
        raise UserError("--blocks says which blocks: leave out --layers, --onto and --recipe")
    if not args.blocks and args.recipe != "half_width" and args.layers is None:
        onto = "--onto needs --layers K, the new depth"
        raise UserError(onto if args.onto else "give --layers K or --blocks LIST")
    if args.onto and how(args) != Recipe(seed=args.seed):
        raise UserError(
            "--onto takes whole blocks: leave out --recipe, --parts, --layernorms, --released_slice"
        )
    if (args.layers == "auto") != (args.data is not None):
        raise UserError("--layers auto and --data FOLDER go together: the data that the choice is made on")
    if args.layers == "auto" and (args.recipe != "first" or args.onto):
        raise UserError("--layers auto chooses the blocks: leave out --recipe and --onto")
    if not -(2**63) <= args.seed < 2**64:
        raise UserError(f"--seed must be a number of 64 bits, not {args.seed}")
    if args.layers not in (None, "auto") and not (args.layers.isdecimal() and int(args.layers)):
        raise UserError(f"--layers must be a whole number from 1 on, or auto, not {args.layers!r}")


def how(args: argparse.Namespace) -> Recipe:
    return Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})


def parse_blocks(text: str) -> list[int]:
    """[0, 1, 2, 23] from "0-2,23". Raises UserError."""
    blocks = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        found = match and range(int(match[1]), int(match[2] or match[1]) + 1)
        if not found:
            what = f"{part!r} is not a number or a range"
            raise UserError(f"--blocks {text!r}: {what}; write them like 0-11,23")
        blocks += found
    return blocks


def check_other(args: argparse.Namespace, folder: str) -> None:
    """Raise UserError for flags that a model which model.py does not implement cannot have."""
    flags = {
        "--onto": args.onto,
        "--parts": args.parts != "all",
        "--layernorms": not args.layernorms,
        "--released_slice": args.released_slice,
        f"--recipe {args.recipe}": args.recipe in ("half_width", "random"),
    }
    if given := next((flag for flag, is_given in flags.items() if is_given), None):
        raise UserError(f"{folder} is no GPT-2: only whole blocks can be taken of it: leave out {given}")


def cut_model(source: str, out: str, blocks: list[int] | None, recipe: str, layers: int | None, notes) -> str:
    """Make a new folder with some blocks of the model in `source`; says in a text what it is."""
    config = open_config(source)
    blocks = blocks or choose_blocks(recipe, config.n_layer, layers)
    new, weights = config.with_blocks(blocks), open_weights(source, config)
    state = assemble(weights, [(weights, i) for i in blocks], False, config.block_prefix)
    content = new.content(next(iter(state.values())).dtype)
    lineage = checkpoint.new_lineage(source, blocks, **notes)
    size = write_inherited(source, out, state, content, {}, lineage)
    warning = f"\n{new.warning}" if new.warning else ""
    return f"{out}: {len(blocks)} of {config.n_layer} blocks, {size}{warning}"


@one_line
def main(argv=None):
    """Command line: make a new checkpoint folder out of another."""
    args = make_parser().parse_args(argv)
    check(args)
    folder = checkpoint.find(args.ckpt)
    blocks = parse_blocks(args.blocks) if args.blocks else None
    layers, notes = None, {}
    if args.layers == "auto":
        blocks, reason = choose_for(folder, args.data)
        print(f"blocks {', '.join(map(str, blocks))}: {reason}", flush=True)
        notes = {"layers_auto": reason}
    elif args.layers:
        layers = int(args.layers)
    if is_other(folder):
        check_other(args, folder)
        made = cut_model(folder, args.out, blocks, args.recipe, layers, notes)
        print(f"{made}\ntrain it with\n  python train.py --init_from={args.out} …")
        return
    onto = checkpoint.find(args.onto) if args.onto else None
    files = tokenizer_files(GPTConfig.from_folder(folder), folder)
    what = {"layers": layers, "blocks": blocks, "onto": onto, "notes": notes, **vars(how(args))}
    made = make_checkpoint(folder, args.out, lambda config: GPT(GPTConfig(**config)), files, **what)
    print(f"{made}; train it with\n  python train.py --init_from={args.out} …")


if __name__ == "__main__":
    main()
