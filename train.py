"""Train a GPT: from scratch, from a checkpoint, or from the first blocks of one.

    python train.py config/demo.py --seed=2
    torchrun --nproc_per_node=8 train.py config/inheritune_gpt2_large.py

`setup` builds everything a run needs into one Run, `fit` is the loop. A step's state is written down before anything
else happens at that step, so a run that is killed goes on from there (--resume=auto) exactly as if it had not been.
"""

import contextlib
import dataclasses
import math
import os
import time
from dataclasses import dataclass, field

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import device as machine
import hf
import inherit
import log
import plan as planning
from data import TrainData, ValData
from distill import distillation_loss
from errors import UserError, one_line
from files import read_json
from model import GPT
from optim import learning_rate, make_optimizer
from ranks import Ranks, seed_all
from settings import GrowSettings, TrainSettings, parse

LOG_COLUMNS = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm")  # reproducible to the last digit
TERMS = ("ce", "kl")  # further columns when there is a teacher: the terms of the loss, before they are weighted
TIMING_COLUMNS = ("step", "tokens_per_s", "mfu", "memory_mb", "train_s", "val_s")
MAX_BAD_STEPS = 10  # non-finite steps in a row that a run survives


@dataclass
class State:
    """What changes from step to step besides weights and moments: saved whole, restored whole."""

    step: int = 0  # optimizer steps behind us
    best_val_loss: float | None = None  # nats/token, among saved checkpoints
    best_step: int | None = None
    bad_steps: int = 0  # steps skipped so far because loss or gradient was not finite
    bad_in_a_row: int = 0
    row: dict = field(default_factory=dict)  # loss, lr, grad_norm of the step that led here


@dataclass
class Run:
    """Everything `fit` needs."""

    settings: TrainSettings
    plan: planning.Plan
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    model: GPT  # the plain module: saved, and the source of truth
    forward: torch.nn.Module  # what computes: the model, compiled and wrapped in DDP as needed
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train: TrainData
    val: ValData
    state: State
    lineage: dict
    teacher: GPT | None  # in eval mode, for distillation
    log: log.CsvLog | None  # rank 0 only, as are the next two
    timing: log.CsvLog | None
    sink: object
    flops_per_token: int
    first_step: int  # where this process began
    train_s: float = 0.0  # since this process began, without validation and saving
    val_s: float = 0.0


def setup(settings, plan, ranks, device):
    """Build the Run on every rank. Raises the same UserError on all ranks if it fails on any."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs; no effect elsewhere
    seed_all(settings.seed)  # alike on all ranks: they start from the same weights

    train, val = ranks.agree(lambda: open_data(settings, plan))
    if plan.resume_from:
        folder = plan.resume_from
    elif settings.init_from != "scratch":
        folder = ranks.once_per_node(lambda: checkpoint.find(settings.init_from))
    else:
        folder = None
    model, lineage = ranks.agree(lambda: build_model(settings, plan, folder))
    model.to(device)
    teacher = None
    if settings.teacher:
        found = ranks.once_per_node(lambda: checkpoint.find(settings.teacher))
        teacher = ranks.agree(lambda: hf.load_model(found)).to(device).eval().requires_grad_(False)
    optimizer = make_optimizer(model, settings, device)
    dtype = machine.pick_dtype(settings.dtype, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = State()
    if plan.resume_from:
        state = ranks.agree(lambda: restore(folder, model, optimizer, scaler))

    logs = ranks.agree(lambda: open_logs(settings, state, plan) if ranks.first else (None, None, None))
    forward = model
    if settings.compile or (settings.compile is None and device.type == "cuda"):
        forward = torch.compile(forward)
    if ranks.world > 1:
        forward = DistributedDataParallel(forward, device_ids=[device.index] if device.type == "cuda" else None)
    return Run(
        settings=settings,
        plan=plan,
        ranks=ranks,
        device=device,
        dtype=dtype,
        model=model,
        forward=forward,
        optimizer=optimizer,
        scaler=scaler,
        train=train,
        val=val,
        state=state,
        lineage=lineage,
        teacher=teacher,
        log=logs[0],
        timing=logs[1],
        sink=logs[2],
        flops_per_token=model.estimate_flops(),
        first_step=state.step,
    )


def open_data(settings, plan):
    """(TrainData, ValData) of a run. Validation comes in groups of batch_size windows on any number of ranks."""
    T = plan.config.block_size
    train = TrainData(settings.dataset, T, settings.seed, settings.data_start, settings.data_end)
    return train, ValData(settings.dataset, T, settings.eval_tokens, settings.batch_size)


def build_model(settings, plan, folder):
    """(model, lineage): fresh weights when folder is None, else those of the checkpoint folder, of which only the
    first blocks and positions that the plan's config has are read."""
    model = GPT(plan.config)
    if folder is None:
        return model, {}
    weights, source = hf.open_model(folder)
    if plan.resume_from:
        hf.fill(model, weights, folder)
        return model, checkpoint.lineage_of(folder)
    blocks = list(range(plan.config.n_layer))
    state, _ = inherit.inherit(weights, source, blocks)
    wpe = "transformer.wpe.weight"
    state[wpe] = state[wpe][: plan.config.block_size]
    hf.fill(model, state, folder)
    return model, inherit.lineage(folder, blocks)


def restore(folder, model, optimizer, scaler):
    """Fill optimizer and scaler from a checkpoint folder and return its State. Raises UserError."""
    checkpoint.load_optimizer(folder, model, optimizer)
    saved = read_json(os.path.join(folder, "state.json"))
    try:
        if scaler.is_enabled():
            scaler.load_state_dict(saved["scaler"])
        saved["row"] = {k: float(v) for k, v in saved["row"].items()}
        return State(**{f.name: saved[f.name] for f in dataclasses.fields(State)})
    except (KeyError, RuntimeError) as e:
        raise UserError(f"{folder}/state.json lacks {e}; delete the folder to go on from the one before it") from None


def open_logs(settings, state, plan):
    """Make the run folder, clear what a kill left in it, and open (log, timing, sink) at the state's step."""
    os.makedirs(settings.out_dir, exist_ok=True)
    checkpoint.sweep(settings.out_dir)
    last_step = state.step if plan.resume_from else -1
    if plan.resume_from:
        checkpoint.link(settings.out_dir, "latest", state.step)
    columns = LOG_COLUMNS + TERMS if settings.teacher else LOG_COLUMNS
    names = (("log.csv", columns), ("timing.csv", TIMING_COLUMNS))
    logs = [log.CsvLog(os.path.join(settings.out_dir, name), columns, last_step) for name, columns in names]
    return *logs, log.open_sink(settings.log_to, settings.out_dir, dataclasses.asdict(settings))


def fit(run):
    """Train until max_iters or stop_at_val_loss; returns the last validation loss (nats/token).

    At each step: save, validate, log, then update. The last pass does all but update.
    """
    s, state = run.settings, run.state
    save_interval = s.save_interval or s.eval_interval
    seen = run.ranks.once(lambda: run.log.last())  # of a continued run: the row of this very step may be there
    here = seen if seen and seen["step"] == state.step else None
    saved = run.plan.resume_from is not None
    while True:
        last = state.step >= s.max_iters
        if state.step and (state.step % save_interval == 0 or last) and not saved:
            save(run)
            saved = True
        if here:
            val_loss = here["val_loss"]
        else:
            val_loss = validate(run) if state.step % s.eval_interval == 0 or last else None
            report(run, val_loss)
        reached = s.stop_at_val_loss is not None and val_loss is not None and val_loss <= s.stop_at_val_loss
        if reached and not saved:
            save(run)
            saved = True
        best = math.inf if state.best_val_loss is None else state.best_val_loss
        if saved and val_loss is not None and val_loss < best:
            state.best_val_loss, state.best_step = val_loss, state.step
            run.ranks.agree(lambda: run.ranks.first and checkpoint.link(s.out_dir, "best", state.step))
        if last or reached:
            return val_loss
        train_step(run)
        here, saved = None, False


def train_step(run):
    """One optimizer step on one global batch; the new state.row says what it was like.

    The loss is the mean over all tokens of the batch on all ranks. If it or the gradient is not finite, no rank
    updates anything; MAX_BAD_STEPS such steps in a row raise UserError.
    """
    s, plan, state, ranks = run.settings, run.plan, run.state, run.ranks
    began = time.perf_counter()
    lr = learning_rate(state.step, s)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.forward.train()
    idx, targets = run.train.batch(state.step * plan.sequences, plan.sequences, ranks.rank, ranks.world)
    sums = torch.zeros(3 if run.teacher else 1, device=run.device)  # loss, and with a teacher its terms CE and KL
    for m in range(plan.accumulation):
        rows = slice(m * plan.micro_batch, (m + 1) * plan.micro_batch)
        x, y = to_device(idx[rows], run.device), to_device(targets[rows], run.device)
        if s.dropout:
            seed_all(s.seed, state.step, m, ranks.rank)
        final = m == plan.accumulation - 1  # gradients are averaged over ranks once, with the last micro-batch
        with contextlib.nullcontext() if final or ranks.world == 1 else run.forward.no_sync():
            with machine.autocast(run.device, run.dtype):
                losses = distilled(run, x, y) if run.teacher else (run.forward(x, y),)
            run.scaler.scale(losses[0] / plan.accumulation).backward()
        sums += torch.stack(losses).detach()
    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), s.grad_clip or math.inf).item()
    loss, *terms = (ranks.sum(sums.cpu() / plan.accumulation, run.device) / ranks.world).tolist()
    # The averaged gradient and the summed loss are the same on every rank, so all ranks decide alike.
    if math.isfinite(loss) and math.isfinite(grad_norm):
        run.scaler.step(run.optimizer)
        state.bad_in_a_row = 0
    else:
        state.bad_steps += 1
        state.bad_in_a_row += 1
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.row = {"loss": loss, "lr": lr, "grad_norm": grad_norm} | dict(zip(TERMS, terms, strict=False))
    run.train_s += time.perf_counter() - began
    if state.bad_in_a_row:
        if ranks.first:
            print(f"step {state.step}: loss {loss}, gradient norm {grad_norm}: no update made")
        if state.bad_in_a_row >= MAX_BAD_STEPS:
            raise UserError(
                f"{MAX_BAD_STEPS} steps in a row without a finite loss and gradient; the last good checkpoint is "
                f"{s.out_dir}/latest: continue from an earlier one with a lower learning_rate"
            )


def distilled(run, x, y):
    """(loss, CE, KL) of one micro-batch against the teacher."""
    with torch.no_grad():
        teacher_logits = run.teacher(x)
    s = run.settings
    return distillation_loss(run.forward(x), teacher_logits, y, run.model.config.n_vocab, s.kd_alpha, s.kd_temperature)


def to_device(tensor, device):
    """Move token ids to the device; to a GPU without waiting for the copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def validate(run):
    """`mean_loss` of the run's model, its time kept apart from training's."""
    began = time.perf_counter()
    # the model without DDP: ranks may have different numbers of groups
    model = run.forward.module if isinstance(run.forward, DistributedDataParallel) else run.forward
    loss = mean_loss(model, run.val, run.ranks, run.device, run.dtype)
    run.val_s += time.perf_counter() - began
    return loss


@torch.inference_mode()
def mean_loss(model, val, ranks, device, dtype):
    """Mean loss (nats/token) over the fixed validation tokens of `val`, the same number on every rank.

    Ranks take turns with the groups of windows; each group's sum has its own place, so the total does not depend on
    how many ranks there are. Leaves the model in eval mode.
    """
    model.eval()
    sums = torch.zeros(val.n_groups, dtype=torch.float64)
    for g in range(ranks.rank, val.n_groups, ranks.world):
        idx, targets = val.batch(g)
        with machine.autocast(device, dtype):
            loss = model(to_device(idx, device), to_device(targets, device))
        sums[g] = loss.double().cpu() * targets.numel()
    return ranks.sum(sums, device).sum().item() / (val.n_windows * val.block_size)


def save(run):
    """Write the checkpoint of this step, on rank 0, and delete those that are no longer kept."""
    s, state = run.settings, run.state

    def write():
        content = dataclasses.asdict(state) | {
            "row": {k: repr(v) for k, v in state.row.items()},  # may be nan or inf, for which JSON has no number
            "tokens": state.step * s.batch_tokens,
            "scaler": run.scaler.state_dict(),
            "settings": dataclasses.asdict(s),
            **checkpoint.environment(),
        }
        checkpoint.save(s.out_dir, run.model, run.optimizer, content, run.lineage, tokenizer_from=s.dataset)
        checkpoint.prune(s.out_dir, s.keep_last, state.best_step)

    run.ranks.agree(lambda: write() if run.ranks.first else None)


def report(run, val_loss):
    """Print and log this step's row, on rank 0, when the step is due or was validated."""
    s, state = run.settings, run.state
    if not run.ranks.first or (state.step % s.log_interval and val_loss is None):
        return
    row = {"step": state.step, "tokens": state.step * s.batch_tokens, "val_loss": val_loss, **state.row}
    run.log.write(row)
    steps = state.step - run.first_step
    speed = steps * s.batch_tokens / run.train_s if steps else None  # tokens/s over all ranks
    peak = machine.peak_flops(run.device)
    mfu = speed * run.flops_per_token / (peak * run.ranks.world) if speed and peak else None
    memory = machine.peak_memory_mb(run.device)
    times = {
        "tokens_per_s": speed,
        "mfu": mfu,
        "memory_mb": memory,
        "train_s": run.train_s,
        "val_s": run.val_s,
    }
    run.timing.write({"step": state.step, **times})
    run.sink(state.step, {k: v for k, v in (row | times).items() if v is not None})
    parts = [f"step {state.step}/{s.max_iters}"]
    if state.row:
        parts += [
            f"loss {state.row['loss']:.4f}",
            f"lr {state.row['lr']:.2e}",
            f"grad {state.row['grad_norm']:.2f}",
        ]
    if val_loss is not None:
        parts.append(f"val {val_loss:.4f}")
    parts.append(f"{row['tokens']:,} tokens")
    if speed:
        left = (run.train_s + run.val_s) / steps * (s.max_iters - state.step)
        parts += [f"{speed:,.0f} tok/s", f"mfu {mfu:.1%}" if mfu else "mfu n/a", f"eta {clock(left)}"]
    print(" | ".join(parts), flush=True)


def clock(seconds):
    """Seconds as h:mm:ss."""
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


@one_line
def main(argv=None):
    """Command line: plan the run, and carry it out unless it is a dry run."""
    description = "Train a GPT from scratch, from a checkpoint, or from the first blocks of one."
    settings, given = parse((TrainSettings,), argv, description, others={"grow.py": GrowSettings})
    ranks = Ranks()
    plan = planning.make_plan(settings, given, ranks.world)
    if settings.dry_run:
        if ranks.first:
            print(planning.describe(plan, settings))
        return
    device = machine.pick(settings.device, ranks.local)
    with ranks.joined(device):
        run = setup(settings, plan, ranks, device)
        if ranks.first:
            c = plan.config
            print(
                f"{c.n_layer} blocks, {run.model.num_params():,} parameters, {device}; a step is "
                f"{settings.batch_tokens:,} tokens = {plan.micro_batch} x {c.block_size} x {plan.accumulation} "
                f"accumulation x {ranks.world} rank(s); an epoch is {run.train.n_windows / plan.sequences:,.1f} steps"
            )
        val_loss = fit(run)
        if ranks.first:
            shown = "" if val_loss is None else f", val {val_loss:.4f}"
            print(f"done: {settings.out_dir}, step {run.state.step}{shown}")


if __name__ == "__main__":
    main()
