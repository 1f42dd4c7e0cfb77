"""Every setting of train.py, grow.py and replicate.py, each with its default and its line of help.

The defaults are the paper's (arXiv 2404.08634, section 3) for its smallest model, where it gives a value.
command_line.py reads a config file and a command line into these classes.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

_heading = ""  # the heading of the settings defined next


def heading(text: str) -> None:
    """Begin a group of settings: --help shows those that follow under this heading."""
    global _heading
    _heading = text


def setting(default, help, low=None, high=None):
    """A dataclass field with its line of help and, for a number, its range (both ends are allowed)."""
    metadata = {"help": help, "low": low, "high": high, "heading": _heading}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class TrainSettings:
    """What one run of train.py does. `sec.` and `app.` refer to the paper."""

    heading("paths")
    out_dir: str = setting("out", "run folder: checkpoints, log.csv, timing.csv")
    dataset: str = setting("data/openwebtext", "data folder with train and val bins")
    data_start: float = setting(0.0, "fraction of the training stream where this run's part begins", 0.0, 1.0)
    data_end: float = setting(1.0, "fraction of the training stream where this run's part ends", 0.0, 1.0)

    heading("model")
    init_from: str = setting("scratch", "scratch, or what to start from: checkpoint, run folder or hub id")
    inherit_layers: int | None = setting(None, "take only this many blocks of init_from, the first ones", 1)
    n_layer: int = setting(12, "transformer blocks", 1, 1000)  # the three sizes: sec. 3, Small
    n_head: int = setting(12, "attention heads", 1)
    n_embd: int = setting(768, "width C", 1)
    block_size: int = setting(1024, "context length T in tokens", 1)  # sec. 3
    bias: bool = setting(False, "biases in linear layers and LayerNorms")  # sec. 3
    dropout: float = setting(0.0, "dropout probability", 0.0, 0.999)  # sec. 3
    # the released model.py has it on; v2 of the paper names it, v4 does not
    scale_attn_by_inverse_layer_idx: bool = setting(False, "divide attention logits by (block number + 1)")

    heading("batch and length")
    # the paper does not state Small's batch: half a million tokens, as GPT-3 small
    batch_tokens: int = setting(491_520, "tokens per optimizer step, whatever the number of ranks", 1)
    batch_size: int = setting(12, "upper limit of sequences per micro-batch on one rank", 1)
    max_iters: int = setting(100_000, "optimizer steps", 1)  # sec. 3: T = 100K everywhere
    stop_at_val_loss: float | None = setting(None, "stop once validation loss (nats/token) reaches this")
    stop_after_worse: int | None = setting(None, "stop after this many validations without a new best", 1)
    max_hours: float | None = setting(None, "save and end after this many hours, as on SIGTERM", 0.0, 1e5)

    heading("distillation")
    teacher: str = setting("", "checkpoint, run folder or hub id to distil from (default: none)")
    # app. D, and T from v2
    kd_alpha: float = setting(0.6, "loss = kd_alpha CE + (1 - kd_alpha) T^2 KL(teacher to student)", 0.0, 1.0)
    kd_temperature: float = setting(1.0, "T, by which both sides' logits are divided in KL", 0.01)

    heading("optimizer")
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "muon: for the blocks' matrices, and AdamW for the rest"
    )
    # sec. 3: on linear layers only
    weight_decay: float = setting(0.1, "decay of the blocks' matrices; embeddings and norms have none", 0.0)
    beta1: float = setting(0.9, "AdamW beta1", 0.0, 0.9999999)  # sec. 3
    beta2: float = setting(0.95, "AdamW beta2", 0.0, 0.9999999)  # sec. 3
    # sec. 3; the released scripts clip the sum over micro-batches, we clip the mean
    grad_clip: float = setting(1.0, "clip the gradient's norm to this; 0 does not clip", 0.0)

    heading("learning rate")
    learning_rate: float = setting(6e-4, "peak learning rate", 0.0)  # not stated for Small: GPT-3 small's
    min_lr: float = setting(1e-5, "learning rate at the end of the decay, and after it", 0.0)  # sec. 3
    warmup_iters: int = setting(2000, "steps of linear warm-up", 0)  # sec. 3
    # sec. 3
    schedule: Literal["cosine", "linear", "wsd"] = setting(
        "cosine", "from the peak to min_lr; wsd: stay at the peak, then linear over cooldown_iters"
    )
    lr_decay_iters: int | None = setting(None, "step where the decay ends (default: max_iters)", 0)
    cooldown_iters: int | None = setting(None, "steps of wsd's decay (default: a fifth of lr_decay_iters)", 1)
    layer_lr_decay: float = setting(
        1.0, "a block's rate is this times the next block's; embeddings count as block -1", 0.0, 1.0
    )

    heading("evaluation and checkpoints")
    eval_interval: int = setting(1000, "steps between validations", 1)  # the released logs
    eval_tokens: int = setting(4_000_000, "validate on this many tokens of val, or all if it has fewer", 1)
    also_validate: str = setting("", "a second data folder to validate on: also_val_loss in log.csv")
    log_interval: int = setting(10, "steps between printed and logged lines", 1)
    log_to: Literal["none", "tensorboard", "wandb"] = setting(
        "none", "log there, too (requirements-extra.txt)"
    )
    save_interval: int | None = setting(None, "steps between checkpoints (default: eval_interval)", 1)
    keep_last: int = setting(2, "checkpoints kept besides the best", 1)
    resume: Literal["never", "auto", "must"] = setting(
        "never",
        "if out_dir holds a run: never: refuse; auto: continue it; must: continue it, fail if there is none",
    )
    change: bool = setting(False, "with resume: continue even if max_iters or the learning rates are changed")

    heading("machine")
    seed: int = setting(1337, "seeds the initialisation, the data order and dropout", 0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    # sec. 3: bf16
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "autocast type; auto: bfloat16 if the device multiplies in it, else float16 on CUDA, else float32",
    )
    compile: bool | None = setting(None, "torch.compile the model (default: on CUDA only)")
    checkpoint_activations: Literal["none", "cheap", "full"] = setting(
        "none", "recompute in the backward pass: cheap: norms and GELU; full: all but each block's input"
    )
    shard: bool = setting(False, "FSDP2 in place of DDP: ranks share weights, gradients and optimizer state")
    threads: int | None = setting(None, "CPU threads (default: torch's choice); they change the last bits", 1)
    dry_run: bool = setting(False, "print what would happen, and stop: needs no data, weights or GPU")


@dataclass
class GrowSettings:
    """What grow.py does around train.py: the Inheritune recipe (paper, Algorithm 1)."""

    heading("growth")
    reference: str = setting("", "checkpoint, run folder or hub id (default: out_dir/reference)")
    reference_config: str = setting(
        "", "train.py config file that trains the reference, unless it is finished"
    )
    k_start: int | None = setting(
        None, "blocks of the first round (default: half the reference's)", 1
    )  # sec. 4
    k_step: int = setting(2, "blocks added from round to round", 1)  # paper Algorithm 1
    growth: Literal["reinherit", "onto"] = setting(
        "reinherit",
        "later rounds: reinherit takes all blocks from the reference again; "
        "onto adds its next ones to the trained small model",
    )
    control: bool = setting(
        True, "train random-init controls too: for equal steps, for the pipeline's compute"
    )


@dataclass
class ReplicateSettings:
    """What replicate.py does around train.py: arms × seeds, compared (experiments/arms.py lists the arms)."""

    heading("comparison")
    results: str = setting("", "folder for results.csv, table.md, figures (default: out_dir/results)")
    reference: str = setting("", "checkpoint, run folder or hub id, in place of reference_config")
    reference_config: str = setting("", "train.py config that trains each seed's reference")
    arms: str = setting("all:1", "arms and their numbers of seeds: 'all:1 random:3'; later entries override")
    first_seed: int = setting(1, "seeds count up from this one", 0)
    layers: int | None = setting(None, "blocks of the small models (default: half of the reference's)", 1)
    rounds_from: int | None = setting(None, "first round of growing arms (default: layers - rounds_step)", 1)
    rounds_step: int = setting(2, "blocks added from round to round in the arms that grow", 1)
    seen: float = setting(1.0, "fraction of the training stream for all arms but `unseen`", 0.01, 1.0)
    final_tokens: int | None = setting(None, "tokens for final losses (default: eval_tokens)", 1)
    jobs: int | None = setting(
        None, "arms side by side (default: cores / threads; 1 without threads, or on GPUs)", 1
    )
    report: bool = setting(False, "train nothing: table and figures from what results and out_dir hold")


# These change a result by rounding at most, if at all (batch_size: also which activations are dropped out).
# So they are no part of an arm's identity (arms.settings_hash).
MACHINE = frozenset(
    {"out_dir", "batch_size", "log_interval", "log_to", "save_interval", "keep_last", "resume", "device"}
    | {"compile", "checkpoint_activations", "shard", "threads", "dry_run"}
    | {"max_hours", "also_validate", "change"}
)

# What may change when a run is resumed: it changes neither the mathematics nor what a row of the log means.
# max_iters may change if past rates stay the same (planning.same_run_problems), dataset if its tokens do.
HARMLESS = MACHINE | {"stop_at_val_loss", "stop_after_worse", "max_iters", "eval_interval", "dataset"}

# What decides the learning rate of each step. May change for future steps; for steps already made only with
# `change` (planning.same_run_problems).
SCHEDULE = frozenset(
    {"learning_rate", "min_lr", "warmup_iters", "schedule", "lr_decay_iters", "cooldown_iters"}
)
