"""Score a checkpoint: its loss over a whole split, and downstream tasks by lm-evaluation-harness.

    python score.py --ckpt out/ --data data/openwebtext
    torchrun --nproc_per_node=8 score.py --ckpt out/ --data data/openwebtext
    python score.py --ckpt out/ --tasks arc_easy,piqa,sciq,hellaswag,lambada_openai --out scores.json

The split is cut into windows of block_size inputs that do not overlap; the last one may be shorter. So every
token but the very first is predicted exactly once, from the inputs that stand before it in its window. (If
meta.json names a beginning-of-text token, it replaces the first input of each window.)
Nothing is drawn at random, and the sum does not depend on how many processes share the work.
"""

import json
import math
import os
import sys

from inheritune.base.errors import Parser, UserError, nearest, one_line, rank_info
from inheritune.base.files import write_json
from inheritune.data.reader import ValData, check_tokenizer, read_meta
from inheritune.data.tokenizer import has_tokenizer
from inheritune.models.open_model import Config, load_model, open_config
from inheritune.training import device as machine
from inheritune.training.distributed import Ranks
from inheritune.training.losses import mean_loss
from inheritune.weights import checkpoint


def score_split(args, folder: str, config: Config, ranks: Ranks, device) -> dict:
    """{loss in nats/token, perplexity, bits_per_byte, …} of a checkpoint folder on --data's --split.

    Bits count all scored tokens, end-of-text too, as the end of a text must be predicted. Bytes count the
    split's text alone, by meta.json; bytes and bits_per_byte are None where it does not say.
    """

    block_size = args.block_size or config.block_size

    def open_split():
        check_tokenizer(args.data, folder, config)
        if block_size > config.limit:
            raise UserError(f"--block_size {block_size}: {folder} reads at most {config.limit} tokens")
        return ValData(args.data, block_size, None, args.batch_size, args.split)

    windows = ranks.agree(open_split)
    model = ranks.agree(lambda: load_model(folder)).to(device)
    dtype = machine.pick_dtype(args.dtype, device)
    loss = mean_loss(model, windows, ranks, device, dtype, title=f"loss on {args.data}")
    n_bytes = read_meta(args.data).get("splits", {}).get(args.split, {}).get("bytes")
    if not math.isfinite(loss):
        why = "the model's weights, or its activations in this dtype, are not finite"
        raise UserError(f"the loss is {loss}: {why}")
    return {
        "data": args.data,
        "split": args.split,
        "block_size": block_size,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),  # exp overflows a float above 709
        "bits_per_byte": loss * windows.n_targets / math.log(2) / n_bytes if n_bytes else None,
        "tokens_scored": windows.n_targets,
        "bytes": n_bytes,
    }


def loss_text(found: dict) -> str:
    """What `score_split` found, as a line."""
    bits = "" if found["bits_per_byte"] is None else f", {found['bits_per_byte']:.4f} bits per byte"
    losses = f"loss {found['loss']:.4f} nats/token, perplexity {found['perplexity']:.3f}{bits}"
    over = f"over {found['tokens_scored']:,} tokens in windows of {found['block_size']:,}"
    return f"{found['data']}, {found['split']}: {losses}, {over}"


def open_tasks(args, world: int):
    """(names of --tasks, lm-evaluation-harness's TaskManager, which knows them all; None for no tasks).

    Raises UserError for arguments that make no sense.
    """
    names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
    if not args.data and not names:
        raise UserError("nothing to score: give --data FOLDER for the loss, --tasks LIST, or both")
    if not names and (args.include_path or args.limit is not None):
        raise UserError("--include_path and --limit belong to --tasks, which is not given")
    if args.block_size is not None and not (args.data and args.block_size >= 1):
        raise UserError("--block_size must be at least 1, and belongs to --data")
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise UserError("--batch_size and --limit must be at least 1")
    if args.include_path and not os.path.isdir(args.include_path):
        raise UserError(f"--include_path: no folder {args.include_path!r}")
    if args.out and not os.path.isdir(os.path.dirname(args.out) or "."):
        raise UserError(f"--out {args.out}: there is no such folder")
    if args.out and os.path.isdir(args.out):
        raise UserError(f"--out {args.out} is a folder; name a file in it")
    if not names:
        return [], None
    if world > 1:
        raise UserError("--tasks runs in one process: leave torchrun to a command of its own for --data")
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as e:
        raise UserError(f"--tasks needs {e.name}: pip install -r requirements-extra.txt") from None
    manager = TaskManager(include_path=args.include_path)  # needs an extra package
    for name in names:  # needs an extra package
        if name not in manager.all_tasks:
            meant = nearest(name, manager.all_tasks)
            raise UserError(f"lm_eval knows no task {name!r}{meant}; see --include_path")
    return names, manager  # needs an extra package


def score_tasks(args, names: list[str], manager, folder: str, device) -> dict:  # needs an extra package
    """Run tasks by lm-evaluation-harness, print its table, and return what its results.json holds. Shots,
    prompts and seeds are the tasks' own; the weights are in --dtype."""
    import lm_eval
    from lm_eval.utils import make_table

    if not has_tokenizer(folder):
        raise UserError(f"{folder} has no tokenizer files: copy its tokenizer's tokenizer.json into it")
    dtype = str(machine.pick_dtype(args.dtype, device)).removeprefix("torch.")
    options = {"limit": args.limit, "batch_size": args.batch_size, "device": str(device)}
    model = {"pretrained": folder, "dtype": dtype}
    said = lm_eval.simple_evaluate("hf", model, tasks=names, task_manager=manager, **options)
    print(make_table(said))
    kept = {key: said[key] for key in ("results", "versions", "n-shot", "n-samples")}
    # JSON has no form for NaN and infinity: they become text
    return json.loads(json.dumps(kept, default=str), parse_constant=str) | {"limit": args.limit}


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(description="Score a checkpoint on a data folder, on downstream tasks, or on both.")
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint folder, run folder (its best) or Hugging Face id")
    add("--data", help="data folder: loss, perplexity and bits per byte over the whole split")
    add("--split", default="val", help="the split of --data")
    context = "tokens per window of --data, by default the model's context; compare models at the same one"
    add("--block_size", type=int, help=context)
    add("--tasks", help="lm-evaluation-harness tasks, e.g. arc_easy,piqa,sciq (requirements-extra.txt)")
    add("--include_path", help="folder with YAML files of further tasks")
    add("--limit", type=int, help="only this many examples of each task, to try things out")
    add("--batch_size", type=int, default=8, help="windows or requests per forward pass")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=machine.DTYPE_CHOICES)
    add("--out", help="write the results to this JSON file")
    return parser


@one_line(ranks=True)
def main(argv=None):
    """Command line: score, show tables on standard output, and write the JSON file."""
    args = make_parser().parse_args(argv)
    ranks = Ranks(*rank_info())
    names, manager = open_tasks(args, ranks.world)  # a typo shows before the long work
    device = machine.pick(args.device, ranks.local)
    with ranks.joined(device):
        folder = ranks.once_per_node(lambda: checkpoint.find(args.ckpt))
        config = ranks.agree(lambda: open_config(folder))
        found = {"checkpoint": args.ckpt, "folder": folder}
        if args.data:
            found["loss"] = score_split(args, folder, config, ranks, device)
            if ranks.is_first:
                print(loss_text(found["loss"]), flush=True)
    if names:  # needs an extra package
        found["tasks"] = score_tasks(args, names, manager, folder, device)
    if args.out and ranks.is_first:
        write_json(args.out, found)
        print(f"written: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
