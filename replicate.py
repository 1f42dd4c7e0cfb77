"""Replicate the paper's comparison, with the controls it lacks: arms × seeds, one table, two figures.

    python replicate.py config/replicate_smoke.py
    python replicate.py config/replicate_smoke.py --report   # table and figures from what results/ holds

Each arm (inheritune/experiments/arms.py) of each seed is one or a few runs of train.py in out_dir/seed_S/ARM.
An arm that is done leaves row.json there; the same command, run again, makes what is missing. Rows and loss
curves are copied to results/NAME/logs, and the report needs nothing else.
"""

import dataclasses
import glob
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from inheritune.base.cpus import usable_cpus
from inheritune.base.errors import UserError, one_line, raise_all
from inheritune.base.files import read_json, write_json
from inheritune.base.signals import StopRequest, ended_after
from inheritune.experiments import stages
from inheritune.experiments.arms import ARM_DECIDES, Arm, find_arm, impossible, parse_arms, settings_hash
from inheritune.experiments.measurements import cost_of_training, history, make_row, measured_on
from inheritune.experiments.plots import plot_results
from inheritune.experiments.stages import Common
from inheritune.experiments.tables import write_tables
from inheritune.models.open_model import Config, open_config
from inheritune.training import device as machine
from inheritune.training import planning
from inheritune.training.command_line import parse
from inheritune.training.settings import ReplicateSettings, TrainSettings
from inheritune.weights import checkpoint
from model import ARCHITECTURE


@dataclass
class Comparison:
    """What is compared."""

    commons: dict[int, Common]  # of each seed
    seeds: dict[Arm, int]  # how many seeds each arm gets
    left_out: dict[str, str]  # names of arms that cannot be made, and why

    def pairs(self) -> list[tuple[Arm, int]]:
        """[(arm, seed)] of all that was asked for."""
        return [(arm, seed) for arm, count in self.seeds.items() for seed in list(self.commons)[:count]]


def plan_comparison(settings: TrainSettings, rep: ReplicateSettings, explicit: frozenset) -> Comparison:
    """Check everything that can be checked before training. Raises UserError with every problem found.

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
    commons = {seed: plan_seed(settings, rep, explicit, seed) for seed in numbers}
    c = commons[rep.first_seed]
    reasons = impossible(c)
    left_out = {arm.name: reasons[arm.base] for arm in seeds if arm.base in reasons}
    seeds = {arm: count for arm, count in seeds.items() if arm.base not in reasons}
    raise_all(stages.run_problems([stage for arm in seeds for stage in arm.stages(c)]))
    return Comparison(commons, seeds, left_out)


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
        config, flops, layer_steps = kept
        stage = stage and dataclasses.replace(stage, config=config)
    elif stage:
        config, flops, layer_steps = stage.config, stage.flops, stage.layer_steps
    else:
        if os.path.isdir(name) or not settings.dry_run:  # a dry run downloads no weights
            name = checkpoint.find(name, prefer="latest")
        config = planning.find_source(name)[1]
        flops, layer_steps = cost_of_training(name, config)
        config = stages.shared_config(name, config, settings, explicit, [])

    if stage and (stage.settings.init_from != "scratch" or stage.teacher):
        flops = layer_steps = None  # what it starts or learns from was trained, too

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
        reference_flops=flops,
        reference_layer_steps=layer_steps,
        rounds=(*range(first, k, rep.rounds_step), k),
        kd=kd,
        seen=rep.seen,
    )


def kept_reference(rep: ReplicateSettings) -> tuple[Config, float | None, int | None] | None:
    """(config, FLOPs of its training, layer-steps) of a reference in results/NAME/logs, or None. With it a
    report needs neither data nor checkpoints."""
    for folder in sorted(glob.glob(os.path.join(glob.escape(logs_of(rep)), "seed_*", "reference"))):
        if os.path.exists(os.path.join(folder, "config.json")):
            row = read_json(os.path.join(folder, "row.json"))
            return open_config(folder), row["flops"], row["layer_steps"]
    return None


def row_path(out_dir: str, arm: Arm, seed: int) -> str:
    """The path of an arm's row.json, which is there once the arm is done."""
    return os.path.join(out_dir, f"seed_{seed}", arm.name, "row.json")


def finished_row(
    settings: TrainSettings, rep: ReplicateSettings, c: Common, arm: Arm, seed: int
) -> dict | None:
    """The row of an arm that is done and whose runs are still there, else None. Raises UserError when it was
    made with other settings or data."""
    path = row_path(settings.out_dir, arm, seed)
    if not os.path.exists(path) or not all(os.path.exists(s.run) for s in arm.stages(c)):
        return None
    row, folder = read_json(path), os.path.dirname(path)
    if row["settings_hash"] != settings_hash(c, arm):
        raise UserError(f"{path} was made with other settings: restore them, or use another out_dir")
    for key, value in measured_on(settings, rep, c).items():
        if key in row and row[key] != value:  # rows of earlier versions lack some
            what = {"val_tokens": "final_tokens"}.get(key, key)
            raise UserError(f"{folder} was made with another {what}: restore it, or use another out_dir")
    return row


def train_all(settings: TrainSettings, rep: ReplicateSettings, comparison: Comparison) -> None:
    """Train and measure every arm that is not done, `jobs` side by side.

    Raises the first UserError once the arms already running have ended; the others do not begin.
    """
    pairs, commons = comparison.pairs(), comparison.commons
    rows = {(arm, seed): finished_row(settings, rep, commons[seed], arm, seed) for arm, seed in pairs}
    missing = [pair for pair in pairs if rows[pair] is None]
    flops = {(arm, seed): sum(s.flops for s in arm.stages(commons[seed])) for arm, seed in missing}
    on_cpu = machine.pick(settings.device).type == "cpu"
    jobs = rep.jobs or (max(1, usable_cpus() // settings.threads) if on_cpu and settings.threads else 1)
    done, began = [], time.perf_counter()
    ready = f"{len(pairs) - len(missing)} of them done, {jobs} side by side"
    print(f"{len(pairs)} arms × seeds, {ready}", flush=True)

    def work(arm, seed, request):
        target = None if arm.name == "reference" else rows[find_arm("reference"), seed]["curve_loss"]
        row = train_arm(settings, rep, commons[seed], arm, seed, target, request)
        rows[arm, seed] = row
        with stages.ONE_AT_A_TIME:
            keep_logs(settings, rep)  # now, for a report while others are training
            done.append(flops[arm, seed])
            per_flop = (time.perf_counter() - began) / (sum(done) or math.inf)
            eta = planning.duration(per_flop * (sum(flops.values()) - sum(done)))
            progress = f"[{len(done)}/{len(missing)}] seed {seed} {arm.name}"
            print(f"{progress}: val {row['val_loss']:.4f} | eta {eta}", flush=True)

    # the references first: the other arms start from them, or are compared with them
    references = [pair for pair in missing if pair[0].name == "reference"]
    for phase in (references, [pair for pair in missing if pair not in references]):
        with StopRequest() as request, ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(work, *pair, request) for pair in phase]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def train_arm(settings, rep, c: Common, arm: Arm, seed: int, target: float | None, request) -> dict:
    """Run an arm's stages and write its row.json, which is returned."""
    for stage in arm.stages(c):
        stages.run_stage(stage, request, quiet=True)
    row, path = make_row(settings, rep, c, arm, seed, target), row_path(settings.out_dir, arm, seed)
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
    for row in glob.glob("seed_*/*/row.json", root_dir=settings.out_dir):
        arm = glob.escape(os.path.dirname(row))
        others = glob.glob(f"{arm}/config.json", root_dir=settings.out_dir)
        for name in [row, *others, *glob.glob(f"{arm}/*/log.csv", root_dir=settings.out_dir)]:
            target = os.path.join(logs_of(rep), name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(os.path.join(settings.out_dir, name), target)


def write_report(settings: TrainSettings, rep: ReplicateSettings, explicit: frozenset) -> str:
    """Write table and figures from results/NAME/logs alone; returns the table and where all is.

    Arms that are not there yet are left out. Raises UserError when there is no reference.
    """
    logs = dataclasses.replace(settings, out_dir=logs_of(rep))
    comparison = plan_comparison(logs, dataclasses.replace(rep, report=True), explicit)
    arms, curves = {}, {}
    for arm, seed in comparison.pairs():
        if os.path.exists(path := row_path(logs.out_dir, arm, seed)):
            arms.setdefault(arm, []).append(read_json(path))
            found = [(flops, loss) for _, flops, _, loss in history(arm.stages(comparison.commons[seed]))]
            curves.setdefault(arm, []).extend([tuple(zip(*found, strict=True))] if found else [])
    if find_arm("reference") not in arms:
        cure = "run the same command without --report first"
        raise UserError(f"{logs.out_dir} has no row of a reference: {cure}")
    table = write_tables(rep.results, arms, comparison.left_out)
    figures = plot_results(rep.results, arms, curves, settings.optimizer)
    missing = len(comparison.pairs()) - sum(map(len, arms.values()))
    note = f"{missing} arms × seeds are not there yet\n" if missing else ""
    return f"{table}\n{note}written: {rep.results}/results.csv, table.md, {', '.join(figures)}"


def describe_comparison(comparison: Comparison) -> str:
    """The text of --dry_run: every arm, its stages, and what they cost."""
    lines, total = [], 0.0
    c = next(iter(comparison.commons.values()))
    for arm, count in comparison.seeds.items():
        runs = arm.stages(c)
        lines.append(
            f"{arm.name:18} {count} seed(s): {' then '.join(map(stages.stage_text, runs)) or 'given'}"
        )
        total += count * sum(stage.flops for stage in runs)
    lines += [f"{name:18} left out: {why}" for name, why in comparison.left_out.items()]
    return "\n".join([*lines, f"{len(comparison.pairs())} arms × seeds, {total:.3g} FLOPs in all"])


@one_line
def main(argv=None):
    """Command line: train what is missing, then write the table and the figures."""
    about = "The paper's comparison: arms × seeds, one table, two figures. Run again to go on."
    settings, rep, explicit = parse((TrainSettings, ReplicateSettings), argv, about)
    rep.results = rep.results or os.path.join(settings.out_dir, "results")
    if rep.report:
        keep_logs(settings, rep)  # also of a comparison that is still under way
    comparison = plan_comparison(settings, rep, explicit)
    if settings.dry_run:
        print(describe_comparison(comparison))
        return
    if not rep.report:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        for name, why in comparison.left_out.items():
            print(f"{name} is left out: {why}")
        with ended_after(settings.max_hours):
            train_all(settings, rep, comparison)
        keep_logs(settings, rep)
    print("\n" + write_report(settings, rep, explicit))


if __name__ == "__main__":
    main()
