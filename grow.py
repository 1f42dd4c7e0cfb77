"""Grow: the Inheritune recipe from beginning to end (paper, Algorithm 1), next to fair controls.

    python grow.py config/demo.py

Takes a trained reference (or trains one), inherits its first blocks, trains them, and while the small model
is worse than the reference on the same validation tokens, grows it and trains again. Each stage is a run of
train.py in a folder of its own under out_dir; all of them continue where they were, so an interrupted recipe
is just run again.
"""

import os

import torch

from inheritune.base.errors import UserError, one_line, raise_all
from inheritune.base.files import read_json
from inheritune.base.signals import StopRequest, ended_after
from inheritune.experiments import stages
from inheritune.experiments.growth_report import write_growth_report
from inheritune.experiments.measurements import cost_of_training, validation_loss
from inheritune.experiments.stages import Common, Stage
from inheritune.models.open_model import open_config
from inheritune.training import planning
from inheritune.training.command_line import parse
from inheritune.training.logs import loss_curve
from inheritune.training.settings import GrowSettings, TrainSettings
from inheritune.weights import checkpoint
from inheritune.weights.model_card import write_card


def plan_recipe(settings: TrainSettings, grow: GrowSettings, explicit: frozenset) -> Common:
    """What the recipe's runs share. Raises UserError with every problem that can be seen before training."""
    name, stage = grow.reference or os.path.join(settings.out_dir, "reference"), None
    decided = explicit & {"init_from", "inherit_layers", "n_layer", "change"}
    problems = [f"{key} is decided by the recipe (k_start, k_step): leave it out" for key in sorted(decided)]
    if settings.teacher:
        problems.append("teacher: grow.py trains on the next token alone; train.py distils")
    if grow.reference_config:
        stage = stages.plan_reference(grow.reference_config, settings, explicit, name)
        config, dataset = stage.config, stage.settings.dataset
        if dataset != settings.dataset:
            other = f"trains on {dataset}, not on {settings.dataset}: set dataset"
            problems.append(f"{grow.reference_config} {other}")
        if name in planning.RELEASED:
            problems.append(f"{name} is trained already: leave out reference_config (--reference_config=)")
    elif os.path.isdir(name) or grow.reference:
        config = planning.find_source(name)[1]
    else:
        cure = "set reference to a trained one, or reference_config to train one"
        raise UserError(f"there is no reference: {cure}")
    k = grow.k_start or config.n_layer // 2
    if not 1 <= k < config.n_layer:
        problems.append(f"k_start {k} must be at least 1 and below the reference's {config.n_layer} blocks")
    config = stages.shared_config(name, config, settings, explicit, problems)
    rounds = tuple(range(k, config.n_layer, grow.k_step))
    c = Common(
        folder=settings.out_dir,
        flags=stages.small_flags(settings, explicit),
        k=k,
        config=config,
        reference=name,
        reference_stage=stage,
        rounds=rounds,
    )
    small = c.random("random")  # stands for all small runs: their settings are alike
    raise_all(stages.run_problems([*([stage] if stage else []), small]))
    return c


def describe_recipe(grow: GrowSettings, c: Common) -> str:
    """The text of --dry_run: every run, and what it costs if none stops early."""
    own = stages.stage_text(c.reference_stage) if c.reference_stage else f"{c.config.n_layer} blocks, given"
    lines = [f"reference  {c.reference}: {own}"]
    lines += [f"round      {stages.stage_text(c.random('', k))}" for k in c.rounds]
    until = "a round at or below the reference's validation loss is the last one"
    control = "random init for equal steps, and for the compute of the pipeline" if grow.control else "none"
    return "\n".join([*lines, f"           {grow.growth}; {until}", f"controls   {control}"])


def run_to_end(stage: Stage) -> None:
    """Train a stage to its end, with its output on the terminal."""
    with StopRequest() as request:
        stages.run_stage(stage, request)


def run_row(arm: str, run: str, out_dir: str) -> dict:
    """The entry in results.json of a finished run folder, or of a lone checkpoint, whose compute may be
    unknown."""
    folder = checkpoint.find(run, prefer="latest")
    config = open_config(folder)
    state = os.path.join(folder, checkpoint.STATE)
    tokens = read_json(state)["tokens"] if os.path.exists(state) else None
    flops = tokens * config.flops_per_token if tokens is not None else None
    if arm == "reference":
        flops, _ = cost_of_training(folder, config)
    return {
        "arm": arm,  # reference, inheritune, random, random_matched
        "n_layer": config.n_layer,
        "params": config.num_params,
        "tokens": tokens,  # that it was trained on; None when unknown
        "flops": flops,  # of its own training; None when unknown
        "val_loss": (loss_curve(run)[1] or [None])[-1],  # nats/token, after the last step
        "folder": os.path.relpath(run, out_dir),
    }


def train_rounds(c: Common, growth: str, reference: str, target: float) -> list[dict]:
    """Train small models of the depths c.rounds, until one has a loss ≤ target; returns a row for each.

    The first round inherits blocks of `reference`, a checkpoint folder. A later round inherits more of them
    (growth="reinherit"), or puts its next ones onto the model just trained ("onto").
    """
    rows = []
    for k in c.rounds:
        run = f"inheritune_{k:02}"
        if rows and growth == "onto":
            onto = checkpoint.find(os.path.join(c.folder, rows[-1]["folder"]), prefer="latest")
            stage = c.inherited(run, ckpt=reference, layers=k, onto=onto)
        else:  # train.py takes the first k blocks itself
            flags = c.flags | {"init_from": reference, "inherit_layers": k}
            stage = Stage(os.path.join(c.folder, run), c.config.with_blocks(list(range(k))), flags)
        run_to_end(stage)
        rows.append(run_row("inheritune", stage.run, c.folder))
        loss = rows[-1]["val_loss"]
        print(f"\n{k} blocks end at {loss:.4f}, the reference at {target:.4f}", flush=True)
        if loss <= target:
            break
    return rows


def train_controls(c: Common, rows: list[dict], growth: str) -> list[dict]:
    """Train the final small model's architecture from random initialisation, and return a row for each run:
    one with the steps that its weights took, one with the compute of the whole pipeline, if that is known.

    rows: the reference's, and one for each round.
    """
    n_layer, rounds = rows[-1]["n_layer"], rows[1:]
    # onto: count all rounds' tokens; reinherit: only the last round's
    tokens = sum(row["tokens"] for row in (rounds if growth == "onto" else rounds[-1:]))
    batch_tokens, max_iters = c.flags["batch_tokens"], c.flags["max_iters"]

    def train(arm, steps):
        stage = c.random(arm, n_layer).with_flags(stop_at_val_loss=None, stop_after_worse=None)
        if steps != max_iters:  # of several rounds, or stopped early
            stage = stage.with_flags(max_iters=steps, lr_decay_iters=None)
        run_to_end(stage)
        return run_row(arm, stage.run, c.folder)

    controls = [train("random", max(1, tokens // batch_tokens))]
    if rows[0]["flops"] is None:
        print("\nthe reference's training compute is unknown: no control at that of the whole pipeline")
        return controls
    per_step = c.random("random_matched", n_layer).flops_per_step
    return [*controls, train("random_matched", round(sum(row["flops"] for row in rows) / per_step))]


def carry_out(settings: TrainSettings, grow: GrowSettings, c: Common) -> None:
    """Train what the recipe needs, and report it."""
    # the reference
    if c.reference_stage:
        run_to_end(c.reference_stage)
    folder = checkpoint.find(c.reference, prefer="latest")
    target = validation_loss(settings, c.config, folder)
    print(f"\nreference {folder}: validation loss {target:.4f}")
    name = c.reference if os.path.isdir(c.reference) else folder
    rows = [run_row("reference", name, c.folder) | {"val_loss": target}]

    # rounds and controls
    rows += train_rounds(c, grow.growth, folder, target)
    final = os.path.join(c.folder, "final")
    checkpoint.link(final, rows[-1]["folder"])
    measured = {fact: rows[0][fact] for fact in ("val_loss", "tokens") if rows[0][fact] is not None}
    for made in {checkpoint.find(final, prefer) for prefer in ("best", "latest")}:
        write_card(made, "inheritune", folder, reference=measured)
    if grow.control:
        rows += train_controls(c, rows, grow.growth)
    print("\n" + write_growth_report(c.folder, rows))


@one_line
def main(argv=None):
    """Command line: the recipe, its report, its figure."""
    about = "Inheritune: inherit blocks of a reference, train, grow until it is matched; with controls."
    settings, grow, explicit = parse((TrainSettings, GrowSettings), argv, about)
    c = plan_recipe(settings, grow, explicit)
    if settings.dry_run:
        print(describe_recipe(grow, c))
        return
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with ended_after(settings.max_hours):
        carry_out(settings, grow, c)


if __name__ == "__main__":
    main()
