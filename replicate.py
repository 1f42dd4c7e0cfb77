"""Replicate: the paper's comparison, and the controls it lacks, arms × seeds, as one table and two figures.

    python replicate.py config/replicate_smoke.py

Each arm (arms.py) of each seed is one or a few runs of train.py in a folder of its own, out_dir/seed_S/ARM. An arm
that is done leaves row.json there; whatever is missing is made when the same command is run again.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

import analyze
import grow
import inherit
from inheritune.base.errors import UserError, one_line, raise_all
from inheritune.base.files import read_json, write_json
from inheritune.base.signals import Request
from inheritune.experiments.arms import Bench, find_arm, impossible, parse_arms
from inheritune.experiments.plots import curve
from inheritune.experiments.tables import write_results
from inheritune.training import device as machine
from inheritune.training import planning
from inheritune.training.distributed import seed_all
from inheritune.training.logs import read_rows
from inheritune.training.parsing import parse
from inheritune.training.settings import MACHINE, GrowSettings, ReplicateSettings, TrainSettings
from inheritune.weights import checkpoint
from model import GPT, GPTConfig
from train import clock

DECIDED = ("init_from", "inherit_layers", "n_layer", "teacher", "seed", "data_start", "data_end", "resume")
ARCHITECTURE = ("n_head", "n_embd", "bias", "scale_attn_by_inverse_layer_idx", "block_size")
ALONE = threading.Lock()  # torch's generator and threads belong to the whole process


def make_bench(settings, given, rep, seed):
    """The Bench of one seed. Raises UserError."""
    folder = os.path.join(settings.out_dir, f"seed_{seed}")
    small = grow.small_flags(settings, given)
    kd = {key: small.pop(key) for key in ("kd_alpha", "kd_temperature") if key in small}
    part = {"data_end": rep.seen} if rep.seen < 1 else {}
    common = {"dataset": settings.dataset, "seed": seed, **part}
    trained = {}
    if rep.reference_config:
        theirs, config = grow.plan_reference(rep.reference_config, settings.dataset)
        shared = {key: getattr(settings, key) for key in grow.SHARED if key in given}
        flags = shared | common | {"max_iters": theirs.max_iters, "batch_tokens": theirs.batch_tokens}
        name = os.path.join(folder, "reference", "run", "latest")
        tokens, steps = theirs.max_iters * theirs.batch_tokens, theirs.max_iters
        trained = {"reference_flags": flags, "reference_files": (rep.reference_config,)}
    else:
        name = rep.reference if settings.dry_run else checkpoint.find(rep.reference, prefer="latest")
        config, trained = planning.source_config(name), {"reference_flags": None}
        state = os.path.join(name, "state.json")
        known = read_json(state) if os.path.exists(state) else {}
        tokens, steps = known.get("tokens"), known.get("step")
    k = rep.layers or config.n_layer // 2
    first = rep.rounds_from or max(1, k - rep.rounds_step)
    if not 1 <= first <= k < config.n_layer:
        raise UserError(
            f"layers {k} must be below the reference's {config.n_layer} blocks, and rounds_from {first} at most layers"
        )
    return Bench(
        folder=folder,
        flags=small | common | {"max_iters": settings.max_iters, "batch_tokens": settings.batch_tokens},
        k=k,
        rounds=(*range(first, k, rep.rounds_step), k),
        kd=kd,
        seen=rep.seen,
        config=config,
        reference=name,
        reference_flops=None if tokens is None else tokens * planning.costs(config)[1],
        reference_layer_steps=None if steps is None else steps * config.n_layer,
        **trained,
    )


def check(settings, given, rep):
    """({seed: Bench}, {arm: seeds}, {arm: why it is left out}). Raises UserError with every problem that shows."""
    problems = [f"{key} is decided by the arms: leave it out" for key in DECIDED if key in given]
    problems += [f"{key} is the reference's: leave it out" for key in ARCHITECTURE if key in given]
    if bool(rep.reference) == bool(rep.reference_config):
        problems.append("set one of reference_config (to train references) and reference (to take one)")
    raise_all(problems)
    seeds = parse_arms(rep.arms)
    numbers = range(rep.first_seed, rep.first_seed + max(seeds.values(), default=0))
    benches = {seed: make_bench(settings, given, rep, seed) for seed in numbers}
    if not benches:
        raise UserError("arms: there is nothing to do")
    bench = benches[rep.first_seed]
    planning.split_batch(settings.batch_tokens, bench.config.block_size, settings.batch_size, 1)
    reasons = impossible(bench)
    left_out = {arm: reasons[base] for arm in seeds if (base := arm.partition("@")[0]) in reasons}
    return benches, {arm: n for arm, n in seeds.items() if arm not in left_out}, left_out


def count_jobs(settings, rep):
    """How many arms to train side by side. Raises UserError when there are fewer cores than the jobs' threads."""
    cores = os.cpu_count()
    threads = settings.threads or cores
    most = max(1, cores // threads) if machine.pick(settings.device).type == "cpu" else 1
    if rep.jobs and rep.jobs > most:
        raise UserError(f"jobs {rep.jobs}: at most {most} on {cores} cores with {threads} threads each (set threads)")
    return rep.jobs or most


def settings_hash(bench, arm):
    """A short hash of all that decides an arm's numbers: the settings of its stages, and of what it starts from.

    Settings at their default are left out, so that a new one changes no hash.
    """
    defaults = dataclasses.asdict(TrainSettings())
    described = []
    for name in (arm, find_arm(arm).source):
        for stage in find_arm(name).stages(bench, name) if name else []:
            settings, _ = parse((TrainSettings,), [*stage.files, *grow.flags_of(stage.flags)], "")
            chosen = {k: v for k, v in dataclasses.asdict(settings).items() if v != defaults[k] and k not in MACHINE}
            described.append([sorted(chosen.items()), stage.start])
    if find_arm(arm).source and bench.reference_flags is None:
        described.append(checkpoint.identify(bench.reference))
    text = json.dumps(described).replace(bench.reference, "reference").replace(bench.folder, "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_stage(stage, request):
    """Make what a stage starts from, and train it to its end, with train.py's output in a text file beside the run.

    Raises UserError when it fails, and Stopped when the stop.Request asks to end.
    """
    if stage.start and not os.path.exists(stage.start_folder):
        with ALONE:
            inherit.build(inherit.make_parser().parse_args([*stage.start, "--out", stage.start_folder]))
    flags = stage.flags | ({"init_from": stage.start_folder} if stage.start else {})
    os.makedirs(os.path.dirname(stage.run), exist_ok=True)
    log = stage.run + ".txt"
    with open(log, "a", encoding="utf-8") as f:
        status = request.call(grow.train_command(flags, stage.run, stage.files), stdout=f, stderr=f)
    if status:
        with open(log, encoding="utf-8") as f:
            last = ([line.strip() for line in f if line.strip()] or ["no output"])[-1]
        raise UserError(f"training {stage.run} did not finish ({last}); run the same command again to go on")


def wall_seconds(run):
    """Seconds that a run trained and validated; its clocks begin again at 0 wherever it was continued."""
    total = 0.0
    rows = read_rows(os.path.join(run, "timing.csv"))
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        here = float(row["train_s"]) + float(row["val_s"])
        if after is None or float(after["train_s"]) + float(after["val_s"]) < here:
            total += here
    return total


def first_reach(stages, target):
    """{reached_step, reached_flops, reached_layer_steps} up to the first validation at or below target, earlier stages
    counted; None where it never comes there."""
    steps, flops, layer_steps = 0, 0.0, 0
    for stage in stages:
        for row in read_rows(os.path.join(stage.run, "log.csv")):
            if row["val_loss"] and float(row["val_loss"]) <= target:
                here = int(row["step"])
                return {
                    "reached_step": steps + here,
                    "reached_flops": flops + here * stage.flops_per_step,
                    "reached_layer_steps": layer_steps + here * stage.config.n_layer,
                }
        steps, flops = steps + stage.steps, flops + stage.steps * stage.flops_per_step
        layer_steps += stage.layer_steps
    return dict.fromkeys(("reached_step", "reached_flops", "reached_layer_steps"))


def curve_of(stages):
    """(FLOPs, validation losses) of an arm, its stages one after the other."""
    xs, ys, before = [], [], 0.0
    for stage in stages:
        tokens, losses = curve(stage.run)
        per_token = stage.flops_per_step / stage.flags["batch_tokens"]
        xs, ys = xs + [before + t * per_token for t in tokens], ys + losses
        before += stage.steps * stage.flops_per_step
    return xs, ys


def max_ranks(settings, model):
    """MaxRank of each layer on the paper's 100 windows of val, the same for every arm and seed."""
    length = min(analyze.LENGTH, model.config.block_size)
    idx, _ = analyze.draw_windows(settings.dataset, "val", analyze.SEQUENCES, length, seed=1337)
    return analyze.max_rank(model.to(machine.pick(settings.device)), idx).tolist()


def lazy(ranks):
    """How many layers are lazy."""
    return None if ranks is None else sum(r == 1 for r in ranks)


def make_row(settings, rep, bench, arm, seed, target):
    """What row.json says of a trained arm: results.csv's columns, and MaxRank by depth before and after training.

    target: the reference's last loss on its curve, None for the reference itself.
    """
    stages = find_arm(arm).stages(bench, arm)
    at_length = dataclasses.replace(settings, eval_tokens=rep.final_tokens or settings.eval_tokens)
    if stages:
        losses = [float(r["val_loss"]) for r in read_rows(os.path.join(stages[-1].run, "log.csv")) if r["val_loss"]]
        folder = checkpoint.find(stages[-1].run, prefer="latest")
        config = GPTConfig.from_folder(folder)
        with ALONE:
            if stages[-1].start:
                begin = GPT.from_pretrained(stages[-1].start_folder)
            else:
                seed_all(seed)  # as train.py does before it makes the same model
                begin = GPT(config)
            before, after = max_ranks(settings, begin), max_ranks(settings, GPT.from_pretrained(folder))
            final = grow.measure(at_length, config, folder) if rep.final_tokens else losses[-1]
        own = {
            "val_loss": final,
            "curve_loss": losses[-1],
            "steps": sum(s.steps for s in stages),
            "flops": sum(s.steps * s.flops_per_step for s in stages),
            "layer_steps": sum(s.layer_steps for s in stages),
            "wall_s": round(sum(wall_seconds(s.run) for s in stages), 1),
        }
    else:  # a reference that was given
        config, before = bench.config, None
        with ALONE:
            after = max_ranks(settings, GPT.from_pretrained(bench.reference))
            own = {"val_loss": grow.measure(at_length, config, bench.reference), "steps": None, "wall_s": None}
            own["curve_loss"] = grow.measure(settings, config, bench.reference) if rep.final_tokens else own["val_loss"]
        own |= {"flops": bench.reference_flops, "layer_steps": bench.reference_layer_steps}
    whole = {"flops": own["flops"], "layer_steps": own["layer_steps"]}
    if find_arm(arm).source:
        theirs = {"flops": bench.reference_flops, "layer_steps": bench.reference_layer_steps}
        whole = {key: None if theirs[key] is None else whole[key] + theirs[key] for key in whole}
    return {
        "arm": arm,
        "seed": seed,
        **own,
        "params": planning.costs(config)[0],
        "settings_hash": settings_hash(bench, arm),
        "n_layer": config.n_layer,
        "flops_with_reference": whole["flops"],
        "layer_steps_with_reference": whole["layer_steps"],
        **first_reach(stages, own["curve_loss"] if target is None else target),
        "lazy_before": lazy(before),
        "lazy_after": lazy(after),
        "ranks_before": before,
        "ranks_after": after,
        "hardware": checkpoint.environment()["hardware"] | {"threads": torch.get_num_threads()},
    }


def row_of(bench, arm):
    """The row of an arm that is done and whose runs are still there, else None. Raises UserError when it was made with
    other settings."""
    path = os.path.join(bench.folder, arm, "row.json")
    if not os.path.exists(path) or not all(os.path.exists(s.run) for s in find_arm(arm).stages(bench, arm)):
        return None
    row = read_json(path)
    if row["settings_hash"] != settings_hash(bench, arm):
        raise UserError(f"{path} was made with other settings: restore them, or use another out_dir")
    return row


class Progress:
    """One printed line for each arm that ends, with what is left by FLOPs."""

    def __init__(self, todo):
        self.left = sum(todo.values())
        self.count, self.total, self.done, self.began = 0, len(todo), 0.0, time.perf_counter()

    def add(self, arm, seed, flops, row):
        self.count, self.done, self.left = self.count + 1, self.done + flops, self.left - flops
        eta = clock((time.perf_counter() - self.began) * self.left / self.done) if self.done else "n/a"
        print(f"[{self.count}/{self.total}] seed {seed} {arm}: val {row['val_loss']:.4f} | eta {eta}", flush=True)


def run_all(settings, rep, benches, seeds, jobs):
    """Train and measure every arm that is not done, `jobs` side by side, references first; returns all rows.

    Raises the first UserError when the arms already running have ended; the rest are not begun.
    """
    pairs = [(arm, seed) for arm in seeds for seed in list(benches)[: seeds[arm]]]
    rows = {pair: row_of(benches[pair[1]], pair[0]) for pair in pairs}
    todo = {
        (arm, seed): sum(s.steps * s.flops_per_step for s in find_arm(arm).stages(benches[seed], arm))
        for arm, seed in pairs
        if rows[arm, seed] is None
    }
    progress = Progress(todo)
    print(f"{len(pairs)} arms × seeds, {len(pairs) - len(todo)} of them done, {jobs} side by side", flush=True)

    def work(pair):
        arm, seed = pair
        bench = benches[seed]
        target = None if arm == "reference" else rows["reference", seed]["curve_loss"]
        for stage in find_arm(arm).stages(bench, arm):
            run_stage(stage, request)
        row = make_row(settings, rep, bench, arm, seed, target)
        os.makedirs(os.path.join(bench.folder, arm), exist_ok=True)
        write_json(os.path.join(bench.folder, arm, "row.json"), row)
        rows[pair] = row
        for stage in find_arm(arm).stages(bench, arm):
            shutil.rmtree(stage.start_folder, ignore_errors=True)  # as large as a model, and made again if needed
        with ALONE:
            progress.add(arm, seed, todo[pair], row)

    order = {"reference": 0, "reference_scaled": 1}  # what others are compared with and start from
    for phase in range(3):
        with Request() as request, ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(work, pair) for pair in todo if order.get(pair[0], 2) == phase]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [rows[pair] for pair in pairs]


def describe(benches, seeds, left_out):
    """The text of --dry_run: every arm, its stages, and what they cost."""
    lines, total = [], 0.0
    bench = next(iter(benches.values()))
    for arm, count in seeds.items():
        stages = find_arm(arm).stages(bench, arm)
        flops = sum(s.steps * s.flops_per_step for s in stages)
        shape = " then ".join(f"{s.config.n_layer} blocks x {s.config.n_embd} for {s.steps:,} steps" for s in stages)
        lines.append(f"{arm:18} {count} seed(s), {flops:.3g} FLOPs each: {shape or 'given'}")
        total += count * flops
    lines += [f"{arm:18} left out: {why}" for arm, why in left_out.items()]
    return "\n".join([*lines, f"{sum(seeds.values())} arms × seeds, {total:.3g} FLOPs in all"])


@one_line
def main(argv=None):
    """Command line: train what is missing, then write results.csv, table.md, curves.png and rank.png."""
    description = "The paper's comparison: arms × seeds, one table, two figures. Run again to go on."
    settings, rep, given = parse(
        (TrainSettings, ReplicateSettings), argv, description, others={"grow.py": GrowSettings}
    )
    benches, seeds, left_out = check(settings, given, rep)
    if settings.dry_run:
        print(describe(benches, seeds, left_out))
        return
    jobs = count_jobs(settings, rep)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    for arm, why in left_out.items():
        print(f"{arm} is left out: {why}")
    rows = run_all(settings, rep, benches, seeds, jobs)
    stages = [find_arm(row["arm"]).stages(benches[row["seed"]], row["arm"]) for row in rows]
    print("\n" + write_results(rep.results, rows, [curve_of(s) for s in stages], left_out))


if __name__ == "__main__":
    main()
