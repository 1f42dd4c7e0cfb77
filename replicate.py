"""Replicate the paper's comparison, with the controls it lacks: arms × seeds, one table, two figures.

    python replicate.py config/replicate_smoke.py
    python replicate.py config/replicate_smoke.py --report   # table and figures from what results/ holds

Each arm (inheritune/experiments/arms.py) of each seed is one or a few runs of train.py in out_dir/seed_S/ARM.
An arm that is done leaves row.json there; the same command, run again, makes what is missing. Rows and loss
curves are copied to results/NAME/logs, and the report needs nothing else.
"""

import dataclasses
import math
import os
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from inheritune.base.cpus import usable_cpus
from inheritune.base.errors import UserError, one_line, raise_all
from inheritune.base.files import read_json, write_json
from inheritune.base.signals import StopRequest, ended_after
from inheritune.experiments import stages
from inheritune.experiments.arms import ARM_DECIDES, Arm, find_arm, impossible, parse_arms, settings_hash
from inheritune.experiments.measurements import cost_of_training, history, make_row, measured_on
from inheritune.experiments.plots import plot_comparison, plot_compute
from inheritune.experiments.stages import Common
from inheritune.experiments.tables import write_tables
from inheritune.models.open_model import Config, open_config
from inheritune.training import device as machine
from inheritune.training import planning
from inheritune.training.command_line import parse
from inheritune.training.settings import ReplicateSettings, TrainSettings
from inheritune.weights import checkpoint
from model import ARCHITECTURE

Pairs = list[tuple[Arm, Common]]  # each arm of each seed, with what all arms of that seed share


def plan_comparison(
    settings: TrainSettings, rep: ReplicateSettings, explicit: frozenset
) -> tuple[Pairs, dict[str, str]]:
    """(what is to be made, {arm that cannot be made: why}). Raises UserError with every problem that can be
    found before training.

    explicit: the keys of settings that the user has set
    """
    of_arms = explicit & set(ARM_DECIDES) - {"out_dir", "dry_run", "dataset"}
    problems = [f"{key} is decided by the arms: leave it out" for key in ARM_DECIDES if key in of_arms]
    of_reference = explicit & set(ARCHITECTURE) - of_arms - ({"block_size"} if rep.reference else set())
    problems += [f"{key} is the reference's: leave it out" for key in ARCHITECTURE if key in of_reference]
    if bool(rep.reference) == bool(rep.reference_config):
        problems.append("set one of reference_config (to train references) and reference (to take one)")
    raise_all(problems)
    seeds = parse_arms(rep.arms)
    if not seeds:
        raise UserError("arms: there is nothing to do")

    numbers = range(rep.first_seed, rep.first_seed + max(seeds.values()))
    commons = [plan_seed(settings, rep, explicit, seed) for seed in numbers]
    reasons = impossible(commons[0])
    left_out = {arm.name: reasons[arm.base] for arm in seeds if arm.base in reasons}
    pairs = [(arm, c) for arm, count in seeds.items() if arm.base not in reasons for c in commons[:count]]
    raise_all(stages.run_problems([stage for arm, c in dict(pairs).items() for stage in arm.stages(c)]))
    return pairs, left_out


def plan_seed(settings: TrainSettings, rep: ReplicateSettings, explicit: frozenset, seed: int) -> Common:
    """What the arms of one seed share."""
    folder = os.path.join(settings.out_dir, f"seed_{seed}")
    data = {"dataset": settings.dataset, "seed": seed} | ({"data_end": rep.seen} if rep.seen < 1 else {})
    flags = stages.small_flags(settings, explicit) | data
    kd = {key: flags.pop(key) for key in ("kd_alpha", "kd_temperature") if key in flags}

    # the reference: trained here or given; in a report its row and its config.json say what it was
    name, stage = rep.reference, None
    if rep.reference_config:
        run = os.path.join(folder, "reference", "run")
        name = os.path.join(run, "latest")
        stage = stages.plan_reference(rep.reference_config, settings, explicit, run, **data)
        if stage.settings.eval_tokens != settings.eval_tokens:
            theirs = f"{rep.reference_config} validates on {stage.settings.eval_tokens:,} tokens"
            raise UserError(f"{theirs}, the others on {settings.eval_tokens:,}: set eval_tokens")
    if rep.report and (kept := kept_reference(rep)):
        config, cost = kept
        stage = stage and dataclasses.replace(stage, config=config)
    elif stage:
        config, cost = stage.config, (stage.flops, stage.layer_steps)
    else:
        if os.path.isdir(name) or not settings.dry_run:  # a dry run downloads no weights
            name = checkpoint.find(name, prefer="latest")
        config = planning.find_source(name)[1]
        cost = cost_of_training(name, config)
        config = stages.shared_config(name, config, settings, explicit, [])

    if stage and (stage.settings.init_from != "scratch" or stage.teacher):
        cost = None, None  # what it starts or learns from was trained, too

    # the small models
    k = rep.layers or config.n_layer // 2
    first = rep.rounds_from or max(1, k - rep.rounds_step)
    if not 1 <= first <= k < config.n_layer:
        wrong = f"layers {k} must be below the reference's {config.n_layer} blocks"
        raise UserError(f"{wrong}, and rounds_from {first} at most layers")
    return Common(
        folder=folder,
        flags=flags,
        k=k,
        config=config,
        reference=name,
        reference_stage=stage,
        reference_cost=cost,
        rounds=(*range(first, k, rep.rounds_step), k),
        kd=kd,
    )


def kept_reference(rep: ReplicateSettings) -> tuple[Config, tuple] | None:
    """(config, FLOPs and layer-steps of its training) of a reference in results/NAME/logs, or None. With it a
    report needs neither data nor checkpoints."""
    for config in sorted(Path(logs_of(rep)).glob("seed_*/reference/config.json")):
        row = read_json(config.with_name("row.json"))
        return open_config(str(config.parent)), (row["flops"], row["layer_steps"])
    return None


def finished_row(settings: TrainSettings, rep: ReplicateSettings, arm: Arm, c: Common) -> dict | None:
    """The row of an arm that is done and whose runs are still there, else None. Raises UserError when it was
    made with other settings or data."""
    path = c.row_path(arm.name)
    kept = os.path.join(logs_of(rep), os.path.relpath(path, settings.out_dir))  # of the same table
    for made in (path, kept):
        if os.path.exists(made) and read_json(made)["settings_hash"] != settings_hash(c, arm):
            why = "was made with other settings or from another reference"
            raise UserError(f"{made} {why}: restore them, or use another out_dir and another results")
    if not os.path.exists(path) or not all(os.path.exists(s.run) for s in arm.stages(c)):
        return None
    row, folder = read_json(path), os.path.dirname(path)
    for key, value in measured_on(settings, rep, c).items():
        if key in row and row[key] != value:  # rows of earlier versions lack some
            what = {"val_tokens": "final_tokens"}.get(key, key)
            raise UserError(f"{folder} was made with another {what}: restore it, or use another out_dir")
    return row


def train_all(settings: TrainSettings, rep: ReplicateSettings, pairs: Pairs) -> None:
    """Train and measure every arm that is not done, `jobs` side by side.

    Raises the first UserError once the arms already running have ended; the others do not begin.
    """
    rows = {pair: finished_row(settings, rep, *pair) for pair in pairs}
    missing = [pair for pair in pairs if rows[pair] is None]
    flops = {(arm, c): sum(s.flops for s in arm.stages(c)) for arm, c in missing}
    on_cpu = machine.pick(settings.device).type == "cpu"
    jobs = rep.jobs or (max(1, usable_cpus() // settings.threads) if on_cpu and settings.threads else 1)
    done, began = [], time.perf_counter()
    ready = f"{len(pairs) - len(missing)} of them done, {jobs} side by side"
    print(f"{len(pairs)} arms × seeds, {ready}", flush=True)

    def work(arm, c, request):
        target = None if arm.name == "reference" else rows[find_arm("reference"), c]["curve_loss"]
        row = rows[arm, c] = train_arm(settings, rep, arm, c, target, request)
        with stages.ONE_AT_A_TIME:
            keep_logs(settings, rep)  # now, for a report while others are training
            done.append(flops[arm, c])
            per_flop = (time.perf_counter() - began) / (sum(done) or math.inf)
            eta = planning.duration(per_flop * (sum(flops.values()) - sum(done)))
            progress = f"[{len(done)}/{len(missing)}] seed {c.flags['seed']} {arm.name}"
            print(f"{progress}: val {row['val_loss']:.4f} | eta {eta}", flush=True)

    # the references first: the other arms start from them, or are compared with them
    references = [pair for pair in missing if pair[0].name == "reference"]
    for phase in (references, [pair for pair in missing if pair not in references]):
        with StopRequest() as request, ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(work, *pair, request) for pair in phase]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def train_arm(settings, rep, arm: Arm, c: Common, target: float | None, request) -> dict:
    """Run an arm's stages and write its row.json, which is returned."""
    for stage in arm.stages(c):
        stages.run_stage(stage, request, quiet=True)
    row, path = make_row(settings, rep, c, arm, target), c.row_path(arm.name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if arm.name == "reference":  # the report needs it
        write_json(os.path.join(os.path.dirname(path), "config.json"), c.config.content())
    write_json(path, row)
    for stage in arm.stages(c):  # start folders are as large as models, and can be made again
        shutil.rmtree(stage.start_folder, ignore_errors=True)
    return row


def logs_of(rep: ReplicateSettings) -> str:
    """The folder with the rows and loss curves that the report is made from, laid out like out_dir."""
    return os.path.join(rep.results, "logs")


def keep_logs(settings: TrainSettings, rep: ReplicateSettings) -> None:
    """Copy the row.json, config.json and log.csv of every arm that is done to results/NAME/logs."""
    for row in Path(settings.out_dir).glob("seed_*/*/row.json"):
        for source in (row, *row.parent.glob("config.json"), *row.parent.glob("*/log.csv")):
            target = Path(logs_of(rep), source.relative_to(settings.out_dir))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def write_report(settings: TrainSettings, rep: ReplicateSettings, pairs: Pairs, left_out: dict) -> str:
    """Write table and figures from results/NAME/logs alone; returns the table and where all is.

    Arms that are not there yet are left out. Raises UserError when there is no reference.
    """
    arms, curves = {}, {}
    for arm, c in pairs:
        c = dataclasses.replace(c, folder=os.path.join(logs_of(rep), os.path.basename(c.folder)))
        if os.path.exists(path := c.row_path(arm.name)):
            arms.setdefault(arm, []).append(read_json(path))
            found = [(flops, loss) for _, flops, _, loss in history(arm.stages(c))]
            curves.setdefault(arm, []).extend([tuple(zip(*found, strict=True))] if found else [])
    if find_arm("reference") not in arms:
        cure = "run the same command without --report first"
        raise UserError(f"{logs_of(rep)} has no row of a reference: {cure}")
    table = write_tables(rep.results, arms, left_out)
    title = os.path.basename(os.path.normpath(rep.results))
    plot_comparison(os.path.join(rep.results, "curves.png"), arms, curves, title)
    plot_compute(os.path.join(rep.results, "compute.png"), arms, curves, title, settings.optimizer)
    missing = len(pairs) - sum(map(len, arms.values()))
    note = f"{missing} arms × seeds are not there yet\n" if missing else ""
    return f"{table}\n{note}written: {rep.results}/results.csv, table.md, curves.png, compute.png"


def describe_comparison(pairs: Pairs, left_out: dict[str, str]) -> str:
    """The text of --dry_run: every arm, its stages, and what they cost."""
    lines, counts = [], Counter(arm for arm, _ in pairs)
    for arm, c in dict(pairs).items():
        runs = " then ".join(map(stages.stage_text, arm.stages(c))) or "given"
        lines.append(f"{arm.name:18} {counts[arm]} seed(s): {runs}")
    lines += [f"{name:18} left out: {why}" for name, why in left_out.items()]
    total = sum(stage.flops for arm, c in pairs for stage in arm.stages(c))
    return "\n".join([*lines, f"{len(pairs)} arms × seeds, {total:.3g} FLOPs in all"])


@one_line
def main(argv=None):
    """Command line: train what is missing, then write the table and the figures."""
    about = "The paper's comparison: arms × seeds, one table, two figures. Run again to go on."
    settings, rep, explicit = parse((TrainSettings, ReplicateSettings), argv, about)
    rep.results = rep.results or os.path.join(settings.out_dir, "results")
    if rep.report:
        keep_logs(settings, rep)  # also of a comparison that is still under way
    pairs, left_out = plan_comparison(settings, rep, explicit)
    if settings.dry_run:
        print(describe_comparison(pairs, left_out))
        return
    if not rep.report:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        for name, why in left_out.items():
            print(f"{name} is left out: {why}")
        with ended_after(settings.max_hours):
            train_all(settings, rep, pairs)
        keep_logs(settings, rep)
    print("\n" + write_report(settings, rep, pairs, left_out))


if __name__ == "__main__":
    main()
