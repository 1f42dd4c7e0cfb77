"""Grow: the Inheritune recipe from beginning to end (paper, Algorithm 1), next to fair controls.

    python grow.py config/demo.py

Takes a trained reference (or trains one), inherits its first blocks, trains them, and while the small model
is worse than the reference on the same validation tokens, grows it and trains again. Each stage is a run of
train.py in a folder of its own under out_dir; all of them continue where they were, so an interrupted recipe
is just run again.
"""

import dataclasses
import os

import torch

from inheritune.base.errors import UserError, one_line, raise_all
from inheritune.base.files import read_json, replacing, write_json
from inheritune.base.signals import StopRequest
from inheritune.experiments.arms import SHARED, Common, Stage, plan_reference, small_flags
from inheritune.experiments.plots import plot_growth
from inheritune.experiments.stages import curve, measure, run_stage
from inheritune.experiments.tables import growth_label, growth_table, verdicts
from inheritune.training import planning
from inheritune.training.command_line import parse
from inheritune.training.settings import GrowSettings, TrainSettings
from inheritune.weights import checkpoint
from inheritune.weights.model_card import write_card
from model import GPTConfig


def make_common(settings: TrainSettings, given: frozenset, grow: GrowSettings) -> Common:
    """What the recipe's runs share. Raises UserError with every problem that can be seen before training."""
    name = grow.reference or os.path.join(settings.out_dir, "reference")
    decided = given & {"init_from", "inherit_layers", "n_layer"}
    problems = [f"{key} is decided by the recipe (k_start, k_step): leave it out" for key in sorted(decided)]
    if grow.reference_config:
        _, config = plan_reference(grow.reference_config, settings.dataset)
        own = parse((TrainSettings,), [grow.reference_config], "")[0].dataset
        if "dataset" not in given and own != settings.dataset:
            problems.append(
                f"{grow.reference_config} trains on {own}, not on {settings.dataset}: set dataset"
            )
        if name in planning.RELEASED:
            problems.append(f"{name} is trained already: leave out reference_config (--reference_config=)")
    elif os.path.isdir(name) or grow.reference:
        config = planning.source_config(name)
    else:
        cure = "set reference to a trained one, or reference_config to train one"
        raise UserError(f"there is no reference: {cure}")
    k = grow.k_start or config.n_layer // 2
    if not 1 <= k < config.n_layer:
        problems.append(f"k_start {k} must be at least 1 and below the reference's {config.n_layer} blocks")
    raise_all(problems)
    if "block_size" in given:
        config = dataclasses.replace(config, block_size=min(settings.block_size, config.block_size))
    shared = {key: getattr(settings, key) for key in SHARED if key in given}
    return Common(
        folder=settings.out_dir,
        flags=small_flags(settings, given),
        k=k,
        config=config,
        reference=name,
        reference_flags=shared if grow.reference_config else None,
        reference_files=(grow.reference_config,),
    )


def train(stage: Stage) -> None:
    """Train a stage to its end, its output on the terminal."""
    with StopRequest() as request:
        run_stage(stage, request)


def row_of(arm: str, run: str, out_dir: str) -> dict:
    """What results.json says of a finished run folder or a lone checkpoint, whose compute may be unknown."""
    folder = checkpoint.find(run, prefer="latest")
    config = GPTConfig.from_folder(folder)
    params, flops_per_token = config.num_params, config.flops_per_token
    state = os.path.join(folder, "state.json")
    tokens = read_json(state)["tokens"] if os.path.exists(state) else None
    inside = os.path.abspath(run).startswith(os.path.abspath(out_dir) + os.sep)
    return {
        "arm": arm,  # reference, inheritune, random, random_matched
        "n_layer": config.n_layer,
        "params": params,
        "tokens": tokens,  # that it was trained on; None when unknown
        "flops": tokens * flops_per_token if tokens is not None else None,  # of its own training
        "val_loss": (curve(run)[1] or [None])[-1],  # nats/token, after the last step
        "folder": os.path.relpath(run, out_dir) if inside else run,
    }


def rounds(c: Common, grow: GrowSettings, reference: str, target: float):
    """Train the small model, growing it until its loss is ≤ target or it would be as deep as the reference.

    Yields a row after each round. Round 1 inherits from the reference; later ones inherit more of it
    (reinherit) or put its next blocks onto the model just trained (onto).
    """
    k, previous = c.k, None
    while True:
        stage = Stage(c.of(f"inheritune_{k:02}", ""), dataclasses.replace(c.config, n_layer=k), c.flags)
        if previous and grow.growth == "onto":
            start = {"ckpt": reference, "layers": k, "onto": checkpoint.find(previous, prefer="latest")}
            stage = dataclasses.replace(stage, start=start, start_folder=c.of(f"start_{k:02}", ""))
        else:  # train.py does it alone
            flags = c.flags | {"init_from": reference, "inherit_layers": k}
            stage = dataclasses.replace(stage, flags=flags)
        train(stage)
        row = row_of("inheritune", stage.run, c.folder)
        yield row
        if row["val_loss"] <= target or k + grow.k_step >= c.config.n_layer:
            return
        print(f"\n{k} blocks end at {row['val_loss']:.4f}, the reference at {target:.4f}: {grow.k_step} more")
        previous, k = stage.run, k + grow.k_step


def controls(c: Common, rows: list[dict], growth: str):
    """Train the final small model's architecture from random init: as many steps as went into its weights,
    and the compute of the pipeline, if the reference's own is known. Yields a row for each."""
    own = [row for row in rows if row["arm"] == "inheritune"]
    tokens = sum(row["tokens"] for row in (own if growth == "onto" else own[-1:]))
    steps = max(1, tokens // c.flags["batch_tokens"])
    flags = {"run": "", "stop_at_val_loss": None}
    if steps != c.flags["max_iters"]:  # of several rounds, or stopped early
        flags |= {"max_iters": steps, "lr_decay_iters": None}
    stage = c.random("random", rows[-1]["n_layer"], **flags)
    train(stage)
    yield row_of("random", stage.run, c.folder)
    if rows[0]["flops"] is None:
        why = "the reference's training compute is unknown"
        print(f"\n{why}: no control at the compute of the whole pipeline")
        return
    steps = round(sum(row["flops"] for row in rows) / stage.flops_per_step)
    flags |= {"max_iters": steps, "lr_decay_iters": None}
    matched = c.random("random_matched", rows[-1]["n_layer"], **flags)
    train(matched)
    yield row_of("random_matched", matched.run, c.folder)


def describe(settings: TrainSettings, grow: GrowSettings, c: Common) -> str:
    """The text of --dry_run: the stages, and the plan of the first round."""
    depths = [str(d) for d in range(c.k, c.config.n_layer, grow.k_step)]
    first = dataclasses.replace(settings, init_from=c.reference, inherit_layers=c.k)
    small = dataclasses.replace(c.config, n_layer=c.k, dropout=settings.dropout)
    batch = settings.batch_tokens, small.block_size, settings.batch_size, 1
    _, micro, accumulation = planning.split_batch(*batch)
    tokens = planning.part_tokens(settings)
    plan = planning.Plan(1, small, train_tokens=tokens, micro_batch=micro, accumulation=accumulation)
    train_it = f", trained by {grow.reference_config} unless it is there" if grow.reference_config else ""
    control = "random init at equal steps, and at the compute of the pipeline" if grow.control else "none"
    shown = f"{' then '.join(depths)} blocks ({grow.growth}), until validation loss is ≤ the reference's"
    lines = [f"reference    {c.reference}: {c.config.n_layer} blocks{train_it}", f"rounds       {shown}"]
    return "\n".join([*lines, f"controls     {control}", "first round:", planning.describe(plan, first)])


def write_report(out_dir: str, rows: list[dict]) -> str:
    """Write report.md, loss.png and results.json into out_dir, and return the report's text. rows: what was
    trained, the reference first."""
    target = rows[0]["val_loss"]
    last = max(i for i, row in enumerate(rows) if row["arm"] == "inheritune")
    curves = []
    for i, row in enumerate(rows):
        tokens, losses = curve(os.path.join(out_dir, row["folder"]))
        if tokens:
            alpha = 0.5 if row["arm"] == "inheritune" and i != last else 1.0  # earlier rounds are paler
            curves.append((growth_label(row), row["arm"], alpha, tokens, losses))
    title = "Inheritune against its reference and its controls"
    plot_growth(os.path.join(out_dir, "loss.png"), curves, target, title)
    results = {"runs": rows, "matched": rows[last]["val_loss"] <= target, "k": rows[last]["n_layer"]}
    write_json(os.path.join(out_dir, "results.json"), results)
    text = f"# Inheritune\n\n{growth_table(rows)}\n\n" + "\n\n".join(verdicts(rows, target)) + "\n"
    with replacing(os.path.join(out_dir, "report.md"), "w") as f:
        f.write(text + "\n![validation loss](loss.png)\n")
    return text + f"\nreport: {out_dir}/report.md   picture: {out_dir}/loss.png   model: {out_dir}/final"


@one_line
def main(argv=None):
    """Command line: the recipe, its report, its figure."""
    description = "Inheritune: inherit blocks of a reference, train, grow until it is matched; with controls."
    settings, grow, given = parse((TrainSettings, GrowSettings), argv, description)
    c = make_common(settings, given, grow)
    if settings.dry_run:
        print(describe(settings, grow, c))
        return
    if settings.threads:
        torch.set_num_threads(settings.threads)

    # the reference
    if c.reference_flags is not None:
        train(Stage(c.reference, c.config, c.reference_flags, files=c.reference_files))
    folder = checkpoint.find(c.reference, prefer="latest")
    target = measure(settings, c.config, folder)
    print(f"\nreference {folder}: validation loss {target:.4f}")
    name = c.reference if os.path.isdir(c.reference) else folder
    rows = [row_of("reference", name, c.folder) | {"val_loss": target}]

    # rounds and controls
    rows += rounds(c, grow, folder, target)
    final = os.path.join(c.folder, "final")
    checkpoint.link(final, rows[-1]["folder"])
    measured = {fact: rows[0][fact] for fact in ("val_loss", "tokens") if rows[0][fact] is not None}
    for made in {checkpoint.find(final, prefer) for prefer in ("best", "latest")}:
        write_card(made, "inheritune", folder, reference=measured)
    if grow.control:
        rows += list(controls(c, list(rows), grow.growth))
    print("\n" + write_report(c.folder, rows))


if __name__ == "__main__":
    main()
