"""Replicate: the paper's comparison, and the controls it lacks, arms × seeds, as one table and a few figures.

    python replicate.py config/replicate_smoke.py
    python replicate.py config/replicate_smoke.py --report   # table and figures from what results/ holds

Each arm (experiments/arms.py) of each seed is one or a few runs of train.py in a folder of its own,
out_dir/seed_S/ARM. An arm that is done leaves row.json there; whatever is missing is made when the same
command is run again. Rows and loss curves are copied to results/NAME/logs: the report needs nothing else.
"""

import dataclasses
import math
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from inheritune.base.cpus import usable_cpus
from inheritune.base.errors import UserError, one_line, raise_all
from inheritune.base.files import read_json, write_json
from inheritune.base.signals import StopRequest
from inheritune.data.reader import identity
from inheritune.experiments.arms import (
    FIXED,
    SHARED,
    Common,
    find_arm,
    impossible,
    parse_arms,
    plan_reference,
    settings_hash,
    small_flags,
)
from inheritune.experiments.plots import plot_results
from inheritune.experiments.stages import ALONE, curve_of, make_row, run_stage
from inheritune.experiments.tables import write_tables
from inheritune.training import device as machine
from inheritune.training import planning
from inheritune.training.command_line import parse
from inheritune.training.settings import ReplicateSettings, TrainSettings
from inheritune.weights import checkpoint, gpt2_format
from model import ARCHITECTURE


def make_common(settings, given, rep, seed, row=None) -> Common:
    """What the arms of one seed share. row: the reference's, for a report: it says the vocabulary and the
    cost where data and runs are not there."""
    folder = os.path.join(settings.out_dir, f"seed_{seed}")
    small = small_flags(settings, given)
    kd = {key: small.pop(key) for key in ("kd_alpha", "kd_temperature") if key in small}
    part = {"data_end": rep.seen} if rep.seen < 1 else {}
    common = {"dataset": settings.dataset, "seed": seed, **part}

    # the reference
    trained = {"reference_flags": None}
    if rep.reference_config:
        theirs, config = plan_reference(rep.reference_config, settings.dataset)
        shared = {key: getattr(settings, key) for key in SHARED if key in given}
        flags = shared | common | {"max_iters": theirs.max_iters, "batch_tokens": theirs.batch_tokens}
        name = os.path.join(folder, "reference", "run", "latest")
        tokens, steps = theirs.max_iters * theirs.batch_tokens, theirs.max_iters
        trained = {"reference_flags": flags, "reference_files": (rep.reference_config,)}
    else:
        name = rep.reference if settings.dry_run or row else checkpoint.find(rep.reference, prefer="latest")
        kept = os.path.join(logs_of(rep), f"seed_{seed}", "reference")  # with a copy of its config.json
        config = planning.source_config(kept if row and os.path.exists(kept) else name)
        state = os.path.join(name, "state.json")
        known = read_json(state) if os.path.exists(state) else {}
        tokens, steps = known.get("tokens"), known.get("step")
    params, flops_per_token = config.num_params, config.flops_per_token
    flops = None if tokens is None else tokens * flops_per_token
    layer_steps = None if steps is None else steps * config.n_layer
    if row:
        more = (row["params"] - params) // config.n_embd
        config = dataclasses.replace(config, vocab_size=config.vocab_size + more)
        flops, layer_steps = row["flops"], row["layer_steps"]

    # the small models
    k = rep.layers or config.n_layer // 2
    first = rep.rounds_from or max(1, k - rep.rounds_step)
    if not 1 <= first <= k < config.n_layer:
        wrong = f"layers {k} must be below the reference's {config.n_layer} blocks"
        raise UserError(f"{wrong}, and rounds_from {first} at most layers")
    return Common(
        folder=folder,
        flags=small | common,
        k=k,
        config=config,
        reference=name,
        reference_flops=flops,
        reference_layer_steps=layer_steps,
        rounds=(*range(first, k, rep.rounds_step), k),
        kd=kd,
        seen=rep.seen,
        **trained,
    )


def check(settings, given, rep):
    """({seed: Common}, {arm: seeds}, {arm: why it is left out}). Raises UserError with every problem."""
    decided = given & set(FIXED) - {"out_dir", "dry_run", "dataset"}
    problems = [f"{key} is decided by the arms: leave it out" for key in FIXED if key in decided]
    problems += [f"{key} is the reference's: leave it out" for key in ARCHITECTURE if key in given - decided]
    if bool(rep.reference) == bool(rep.reference_config):
        problems.append("set one of reference_config (to train references) and reference (to take one)")
    raise_all(problems)
    seeds = parse_arms(rep.arms)
    if not seeds:
        raise UserError("arms: there is nothing to do")
    numbers = range(rep.first_seed, rep.first_seed + max(seeds.values()))
    places = (settings.out_dir, logs_of(rep)) if rep.report else ()
    rows = [read_row(place, "reference", seed) for place in places for seed in numbers]
    row = next((row for row in rows if row), None)
    commons = {seed: make_common(settings, given, rep, seed, row) for seed in numbers}
    c = commons[rep.first_seed]
    planning.split_batch(settings.batch_tokens, c.config.block_size, settings.batch_size, 1)
    reasons = impossible(c)
    left_out = {arm: reasons[base] for arm in seeds if (base := arm.partition("@")[0]) in reasons}
    return commons, {arm: n for arm, n in seeds.items() if arm not in left_out}, left_out


def pairs_of(commons, seeds) -> list[tuple[str, int]]:
    """[(arm, seed)] of all that was asked for."""
    return [(arm, seed) for arm, count in seeds.items() for seed in list(commons)[:count]]


def count_jobs(settings, rep) -> int:
    """How many arms to train side by side. Raises UserError when the jobs need more threads than cores."""
    cores = usable_cpus()
    threads = settings.threads or cores
    most = max(1, cores // threads) if machine.pick(settings.device).type == "cpu" else 1
    if rep.jobs and rep.jobs > most:
        on = f"{cores} cores with {threads} threads each (set threads)"
        raise UserError(f"jobs {rep.jobs}: at most {most} on {on}")
    return rep.jobs or most


def read_row(out_dir, arm, seed) -> dict | None:
    """row.json of an arm that is done, else None."""
    path = os.path.join(out_dir, f"seed_{seed}", arm, "row.json")
    return read_json(path) if os.path.exists(path) else None


def row_of(settings, c, arm, seed) -> dict | None:
    """The row of an arm that is done and whose runs are still there, else None. Raises UserError when it was
    made with other settings."""
    row = read_row(settings.out_dir, arm, seed)
    if row is None or not all(os.path.exists(s.run) for s in find_arm(arm).stages(c, arm)):
        return None
    if row["settings_hash"] != settings_hash(c, arm):
        path = os.path.join(c.folder, arm, "row.json")
        raise UserError(f"{path} was made with other settings: restore them, or use another out_dir")
    if row.get("data") not in (None, identity(settings.dataset)):
        path = os.path.join(c.folder, arm)
        raise UserError(
            f"{path} was trained on other tokens than {settings.dataset} holds: use another out_dir"
        )
    return row


def run_all(settings, rep, commons, seeds, jobs) -> None:
    """Train and measure every arm that is not done, `jobs` side by side, references first.

    Raises the first UserError when the arms already running have ended; the rest are not begun.
    """
    pairs = pairs_of(commons, seeds)
    rows = {(arm, seed): row_of(settings, commons[seed], arm, seed) for arm, seed in pairs}
    todo = {  # in FLOPs
        (arm, seed): sum(s.flops for s in find_arm(arm).stages(commons[seed], arm))
        for arm, seed in pairs
        if rows[arm, seed] is None
    }
    done, began = [], time.perf_counter()
    ready = f"{len(pairs) - len(todo)} of them done, {jobs} side by side"
    print(f"{len(pairs)} arms × seeds, {ready}", flush=True)

    def work(pair):
        arm, seed = pair
        c = commons[seed]
        target = None if arm == "reference" else rows["reference", seed]["curve_loss"]
        stages = find_arm(arm).stages(c, arm)
        for stage in stages:
            run_stage(stage, request, quiet=True)
        rows[pair] = make_row(settings, rep, c, arm, seed, target)
        os.makedirs(os.path.join(c.folder, arm), exist_ok=True)
        write_json(os.path.join(c.folder, arm, "row.json"), rows[pair])
        keep(rep, c, arm, seed)  # now, for a report while others are training
        for stage in stages:
            if stage.start:  # as large as a model, and made again if needed
                shutil.rmtree(stage.start_folder, ignore_errors=True)
        with ALONE:
            done.append(todo[pair])
            per_flop = (time.perf_counter() - began) / (sum(done) or math.inf)
            eta = planning.duration(per_flop * (sum(todo.values()) - sum(done)))
            loss = f"val {rows[pair]['val_loss']:.4f}"
            print(f"[{len(done)}/{len(todo)}] seed {seed} {arm}: {loss} | eta {eta}", flush=True)

    order = {"reference": 0, "reference_scaled": 1}  # what others are compared with and start from
    for phase in range(3):
        with StopRequest() as request, ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(work, pair) for pair in todo if order.get(pair[0], 2) == phase]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def logs_of(rep) -> str:
    """Where the rows and loss curves are kept that the report is made from, laid out like out_dir."""
    return os.path.join(rep.results, "logs")


def keep(rep, c, arm, seed) -> None:
    """Copy an arm's row.json and the log.csv of each of its stages to results/NAME/logs."""
    folder = os.path.join(logs_of(rep), f"seed_{seed}", arm)
    names = ["row.json"]
    stages = find_arm(arm).stages(c, arm)
    names += [os.path.join(os.path.basename(s.run), "log.csv") for s in stages]
    for name in names:
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        shutil.copyfile(os.path.join(c.folder, arm, name), os.path.join(folder, name))
    if not stages:  # the reference was given, and says what it is
        content = gpt2_format.config_json(dataclasses.asdict(c.config))
        write_json(os.path.join(folder, gpt2_format.CONFIG), content)


def write_report(settings, given, rep) -> str:
    """Write table and figures from results/NAME/logs alone; returns the table and where it all is.

    Arms that are not there yet are left out. Raises UserError when there are none.
    """
    there = dataclasses.replace(settings, out_dir=logs_of(rep))
    commons, seeds, left_out = check(there, given, dataclasses.replace(rep, report=True))
    rows, curves = [], []
    for arm, seed in pairs_of(commons, seeds):
        row = read_row(there.out_dir, arm, seed)
        if row:
            rows.append(row)
            curves.append(curve_of(find_arm(arm).stages(commons[seed], arm)))
    if not any(row["arm"] == "reference" for row in rows):
        cure = "run the same command without --report first"
        raise UserError(f"{there.out_dir} has no row of a reference: {cure}")
    shown = write_tables(rep.results, rows, left_out)
    figures = plot_results(rep.results, rows, curves, settings.optimizer)
    missing = len(pairs_of(commons, seeds)) - len(rows)
    note = f"{missing} arms × seeds are not there yet\n" if missing else ""
    return f"{shown}\n{note}written: {rep.results}/results.csv, table.md, {', '.join(figures)}"


def describe(commons, seeds, left_out) -> str:
    """The text of --dry_run: every arm, its stages, and what they cost."""
    lines, total = [], 0.0
    c = next(iter(commons.values()))
    for arm, count in seeds.items():
        stages = find_arm(arm).stages(c, arm)
        flops = sum(s.flops for s in stages)
        runs = [f"{s.config.n_layer} blocks x {s.config.n_embd} for {s.steps:,} steps" for s in stages]
        shape = " then ".join(runs) or "given"
        lines.append(f"{arm:18} {count} seed(s), {flops:.3g} FLOPs each: {shape}")
        total += count * flops
    lines += [f"{arm:18} left out: {why}" for arm, why in left_out.items()]
    return "\n".join([*lines, f"{sum(seeds.values())} arms × seeds, {total:.3g} FLOPs in all"])


@one_line
def main(argv=None):
    """Command line: train what is missing, then write the table and the figures."""
    description = "The paper's comparison: arms × seeds, one table, a few figures. Run again to go on."
    settings, rep, given = parse((TrainSettings, ReplicateSettings), argv, description)
    commons, seeds, left_out = check(settings, given, rep)
    if settings.dry_run:
        print(describe(commons, seeds, left_out))
        return
    if not rep.report:
        jobs = count_jobs(settings, rep)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        for arm, why in left_out.items():
            print(f"{arm} is left out: {why}")
        run_all(settings, rep, commons, seeds, jobs)
    for arm, seed in pairs_of(commons, seeds):
        if read_row(settings.out_dir, arm, seed):
            keep(rep, commons[seed], arm, seed)
    print("\n" + write_report(settings, given, rep))


if __name__ == "__main__":
    main()
