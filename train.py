"""Train a GPT: from scratch, from a checkpoint, or from the first blocks of one.

    python train.py config/demo_reference.py --seed=2
    torchrun --nproc_per_node=8 train.py config/inheritune_gpt2_large.py

`setup` (run.py) builds everything a run needs into one Run, `fit` is the loop. A step's state is written down before
anything else happens at that step, so a run that is killed goes on from there (--resume=auto) exactly as if it had
not been.
"""

import contextlib
import dataclasses
import functools
import math
import os
import signal
import time

import torch
from torch.nn.parallel import DistributedDataParallel

from inheritune.base.errors import Stopped, UserError, one_line
from inheritune.data import hf_tokenizer
from inheritune.training import cost, planning
from inheritune.training import device as machine
from inheritune.training.distributed import Ranks, seed_all
from inheritune.training.losses import distillation_loss, mean_loss, to_device
from inheritune.training.optimizer import learning_rate, snapshot
from inheritune.training.parsing import parse
from inheritune.training.settings import GrowSettings, ReplicateSettings, TrainSettings
from inheritune.training.setup import TERMS, setup
from inheritune.training.shard import whole
from inheritune.weights import checkpoint

MAX_BAD_STEPS = 10  # non-finite steps in a row that a run survives


def fit(run):
    """Train until max_iters or stop_at_val_loss; returns the last validation loss (nats/token).

    At each step: save, validate, log, then update. The last pass does all but update. When any rank is asked to end
    (stop.py), all of them save at the next step, or at this one if they are validating, and raise Stopped.
    """
    s, state = run.settings, run.state
    save_interval = s.save_interval or s.eval_interval
    seen = run.ranks.once(lambda: run.log.last())  # of a continued run: the row of this very step may be there
    here = seen if seen and seen["step"] == state.step else None
    saved = run.plan.resume_from is not None
    while True:
        last = state.step >= s.max_iters
        due = state.step > 0 and (state.step % save_interval == 0 or last)
        if (due or run.stopping) and not saved:
            save(run)
            saved = True
        if run.stopping:
            stop(run)
        if here:
            val_loss = here["val_loss"]
        else:
            val_loss = validate(run) if state.step % s.eval_interval == 0 or last else None
            if run.stopping:
                continue
            report(run, val_loss)
        reached = s.stop_at_val_loss is not None and val_loss is not None and val_loss <= s.stop_at_val_loss
        if reached and not saved:
            save(run)
        best = math.inf if state.best_val_loss is None else state.best_val_loss
        if (due or reached) and val_loss is not None and val_loss < best:
            state.best_val_loss, state.best_step = val_loss, state.step
            if run.ranks.first:
                run.background.start(functools.partial(checkpoint.link, s.out_dir, "best", state.step))
        if last or reached:
            settle(run)
            return val_loss
        train_step(run)
        here, saved = None, False


def stop(run):
    """End the run, whose state is saved: raise Stopped when that is on disk."""
    settle(run)
    s = run.settings
    where = os.path.join(s.out_dir, checkpoint.step_name(run.state.step))
    how = "run the same command again" if s.resume != "never" else "add --resume=auto"
    number = run.request.signal or signal.SIGTERM  # which came to another rank
    name = signal.Signals(number).name
    raise Stopped(number, f"{name}: saved {where} after step {run.state.step:,}; {how} to go on from there")


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
    idx, targets = next(run.batches)
    sums = torch.zeros(4 if run.teacher else 2, device=run.device)  # asked to end; loss; with a teacher also CE and KL
    for m in range(plan.accumulation):
        rows = slice(m * plan.micro_batch, (m + 1) * plan.micro_batch)
        x, y = to_device(idx[rows], run.device), to_device(targets[rows], run.device)
        if s.dropout:
            seed_all(s.seed, state.step, m, ranks.rank)
        final = m == plan.accumulation - 1  # gradients are averaged over ranks once, with the last micro-batch
        with contextlib.nullcontext() if final or ranks.world == 1 or run.sharded else run.forward.no_sync():
            with machine.autocast(run.device, run.dtype):
                losses = distilled(run, x, y) if run.teacher else (run.forward(x, y),)
            run.scaler.scale(losses[0] / plan.accumulation).backward()
        sums[1:] += torch.stack(losses).detach()
    run.scaler.unscale_(run.optimizer)
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(run.model.parameters(), s.grad_clip or math.inf)).item()
    sums[0] = run.request.signal is not None or run.background.failed
    asked, loss, *terms = (ranks.sum(sums.cpu() / plan.accumulation, run.device) / ranks.world).tolist()
    run.stopping = asked > 0
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


def validate(run):
    """`mean_loss` of the run's model, its time kept apart from training's; None when the run is asked to end."""
    began = time.perf_counter()
    # the model without DDP: ranks may have different numbers of groups
    model = run.forward.module if isinstance(run.forward, DistributedDataParallel) else run.forward

    def stop():  # any rank is asked to end
        asked = torch.tensor(float(run.request.signal is not None))
        return run.ranks.sum(asked, run.device).item() > 0

    loss = mean_loss(model, run.val, run.ranks, run.device, run.dtype, stop, run.sharded)
    if run.sharded:
        run.model.reshard()  # a forward pass keeps embeddings and head gathered for the backward pass, which never came
    run.val_s += time.perf_counter() - began
    run.stopping = loss is None
    return loss


def save(run):
    """Copy this step's state, and let rank 0 write its checkpoint and delete those that are no longer kept while the
    training goes on. Waits for the checkpoint before; what went wrong with that is raised here."""
    settle(run)
    s, state = run.settings, run.state
    tensors = snapshot(run.model, run.optimizer, run.copies if run.ranks.first else None)
    if not run.ranks.first:
        return
    best_step = state.best_step
    content = dataclasses.asdict(state) | {
        "row": {k: repr(v) for k, v in state.row.items()},  # may be nan or inf, for which JSON has no number
        "tokens": state.step * s.batch_tokens,
        "scaler": run.scaler.state_dict(),
        "settings": dataclasses.asdict(s),
    }

    def write():
        config = run.model.config
        files = hf_tokenizer.files(config, s.dataset)
        checkpoint.save(s.out_dir, tensors, dataclasses.asdict(config), content, run.lineage, files)
        checkpoint.prune(s.out_dir, s.keep_last, best_step)

    run.background.start(write)


def settle(run):
    """Wait until the checkpoint that is being written is whole, and the link to the best made."""
    run.ranks.agree(run.background.join)


def report(run, val_loss):
    """Print and log this step's row, on rank 0, when the step is due or was validated."""
    s, state = run.settings, run.state
    if not run.ranks.first or (state.step % s.log_interval and val_loss is None):
        return
    row = {"step": state.step, "tokens": state.step * s.batch_tokens, "val_loss": val_loss, **state.row}
    run.log.write(row)
    steps = state.step - run.first_step
    speed = steps * s.batch_tokens / run.train_s if steps else None  # tokens/s over all ranks
    mfu = cost.mfu(speed, run.model.config, run.device, run.ranks.world) if speed else None
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
    settings, given = parse(
        (TrainSettings,), argv, description, others={"grow.py": GrowSettings, "replicate.py": ReplicateSettings}
    )
    ranks = Ranks()
    plan = planning.make_plan(settings, given, ranks.world)
    if settings.dry_run:
        if ranks.first:
            print(planning.describe(plan, settings))
        return
    device = machine.pick(settings.device, ranks.local)
    with ranks.joined(device), contextlib.closing(setup(settings, plan, ranks, device)) as run:
        if ranks.first:
            c = plan.config
            print(
                f"{c.n_layer} blocks, {run.model.num_params():,} parameters, {device}; a step is "
                f"{settings.batch_tokens:,} tokens = {plan.micro_batch} x {c.block_size} x {plan.accumulation} "
                f"accumulation x {ranks.world} rank(s); an epoch is {run.train.n_windows / plan.sequences:,.1f} steps"
            )
        with run.request:
            val_loss = fit(run)
        if ranks.first:
            shown = "" if val_loss is None else f", val {val_loss:.4f}"
            print(f"done: {settings.out_dir}, step {run.state.step}{shown}")


if __name__ == "__main__":
    main()
