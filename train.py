"""Train a GPT: from scratch, from a checkpoint, or from the first blocks of one.

    python train.py config/replicate_mini_reference.py --seed=2
    torchrun --nproc_per_node=8 train.py config/inheritune_gpt2_large.py

`setup` (inheritune/training/build_run.py) builds everything a run needs, `fit` is the loop. A step's state is
saved before anything else happens at that step, so a killed run goes on from there (--resume=auto) exactly as
if it had not been.
"""

import contextlib
import dataclasses
import functools
import math
import os
import signal
import time

import torch

from inheritune.base.errors import Stopped, UserError, one_line, rank_info
from inheritune.data.tokenizer import tokenizer_files
from inheritune.training.build_run import Run, setup
from inheritune.training.command_line import parse
from inheritune.training.device import pick
from inheritune.training.distributed import AgreedError, Ranks, seed_all
from inheritune.training.logs import TERMS
from inheritune.training.losses import mean_loss, to_device
from inheritune.training.optimizer import learning_rate, snapshot
from inheritune.training.planning import describe, make_plan
from inheritune.training.settings import TrainSettings
from inheritune.weights import checkpoint
from inheritune.weights.model_card import write_card

MAX_BAD_STEPS = 10  # non-finite steps in a row that a run survives


def fit(run: Run) -> float:
    """Train until max_iters or stop_at_val_loss; returns the last validation loss (nats/token).

    Raises Stopped, its state saved, when any rank was asked to stop or could not write.
    """
    s, state = run.settings, run.state
    save_interval = s.save_interval or s.eval_interval
    while True:
        last = state.step >= s.max_iters
        due = state.step > 0 and (state.step % save_interval == 0 or last)
        if due:
            save(run)
        val_loss = validate(run) if state.step % s.eval_interval == 0 or last else None
        run.recorder.report(state.step, state.row, val_loss)
        reached = None not in (s.stop_at_val_loss, val_loss) and val_loss <= s.stop_at_val_loss
        if reached:
            save(run)
        if (due or reached) and val_loss is not None:
            keep_best(run, val_loss)
        if last or reached:
            settle(run)
            return val_loss
        train_step(run)


def train_step(run: Run) -> None:
    """One optimizer step on one global batch; the new state.row says what it was like.

    The loss is the mean over all tokens of the batch on all ranks. If it or the gradient is not finite, no
    rank updates anything; MAX_BAD_STEPS such steps in a row raise AgreedError.
    """
    s, plan, state, ranks, model = run.settings, run.plan, run.state, run.ranks, run.model
    began = time.perf_counter()
    lr = learning_rate(state.step, s)
    for group in run.optimizer.param_groups:
        group["lr"] = lr

    # gradients, micro-batch by micro-batch
    windows = next(run.data.batches)  # (micro_batch · accumulation, T + 1)
    # over micro-batches: [whether to stop, loss], with a teacher also its terms [CE, KL]
    sums = torch.zeros(4 if run.teacher else 2, device=model.device)
    for m in range(plan.accumulation):
        x, y = to_device(windows[m * plan.micro_batch : (m + 1) * plan.micro_batch], model.device)
        if s.dropout:
            seed_all(s.seed, state.step, m, ranks.rank)  # frozen: the seeds of dropout
        with model.gradients_of(last=m == plan.accumulation - 1):
            with torch.autocast(model.device.type, model.autocast, enabled=model.autocast != torch.float32):
                losses = run.teacher(model.forward, x, y) if run.teacher else (model.forward(x, y),)
            run.scaler.scale(losses[0] / plan.accumulation).backward()
        sums[1:] += torch.stack(losses).detach()
    run.scaler.unscale_(run.optimizer)
    grad_norm = model.clip_gradients(s.grad_clip)

    # update; gradient and summed loss are the same on every rank, so all ranks decide alike
    sums[0] = run.request.signal is not None or run.saver.failed()
    asked, loss, *terms = (ranks.sum(sums.cpu() / plan.accumulation, model.device) / ranks.world).tolist()
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite:
        run.scaler.step(run.optimizer)
    run.scaler.update()
    model.zero_gradients()
    state.step += 1
    state.bad_steps += not finite
    state.bad_in_a_row = 0 if finite else state.bad_in_a_row + 1
    state.row = {"loss": loss, "lr": lr, "grad_norm": grad_norm} | dict(zip(TERMS, terms, strict=False))
    run.recorder.stepped(state.step, time.perf_counter() - began)

    if not finite and ranks.first:
        print(f"step {state.step}: loss {loss}, gradient norm {grad_norm}: no update made")
    if state.bad_in_a_row >= MAX_BAD_STEPS:
        raise AgreedError(
            f"{MAX_BAD_STEPS} steps in a row without a finite loss and gradient; the last good checkpoint is "
            f"{s.out_dir}/latest: continue from an earlier one with a lower learning_rate"
        )
    if asked:
        stop(run)


def validate(run: Run) -> float:
    """The loss (nats/token) over the validation tokens. Stops the run if a rank is asked to, meanwhile."""
    began, model, device = time.perf_counter(), run.model, run.model.device

    def asked():  # of any rank
        return run.ranks.sum(torch.tensor(float(run.request.signal is not None)), device).item() > 0

    with model.validating() as module:
        loss = mean_loss(module, run.data.val, run.ranks, device, model.autocast, asked, model.sharded)
    run.recorder.validated(time.perf_counter() - began)
    if loss is None:
        stop(run)
    return loss


def save(run: Run) -> None:
    """Copy this step's state. Rank 0 writes it as a checkpoint and deletes old ones while training goes on.

    Waits for the checkpoint before, and raises what went wrong with it. A step is saved once.
    """
    s, state, saver = run.settings, run.state, run.saver
    if saver.step == state.step:
        return
    settle(run)
    saver.step = state.step
    tensors = snapshot(run.model.module, run.optimizer, saver.copies if run.ranks.first else None)
    if not run.ranks.first:
        return
    config, best_step = dataclasses.asdict(run.plan.config), state.best_step
    content = dataclasses.asdict(state) | {
        "row": {k: repr(v) for k, v in state.row.items()},  # may be nan or inf, for which JSON has no number
        "tokens": state.step * s.batch_tokens,
        "scaler": run.scaler.state_dict(),
        "data": run.plan.data,
        "settings": dataclasses.asdict(s),
    }

    def write():
        files = tokenizer_files(run.plan.config, s.dataset)
        checkpoint.write_step(s.out_dir, tensors, config, content, saver.lineage, files)
        checkpoint.prune(s.out_dir, s.keep_last, best_step)

    saver.start(write)


def settle(run: Run) -> None:
    """Wait until the checkpoint under way is whole; what went wrong with it is raised on all ranks."""
    run.ranks.agree(run.saver.finish)


def keep_best(run, val_loss):
    """Let the link `best` point at this step's checkpoint, if no saved one has a lower validation loss."""
    state = run.state
    if val_loss < (math.inf if state.best_val_loss is None else state.best_val_loss):
        state.best_val_loss, state.best_step = val_loss, state.step
        if run.ranks.first:
            best, name = os.path.join(run.settings.out_dir, "best"), checkpoint.step_name(state.step)
            run.saver.start(functools.partial(checkpoint.link, best, name))


def stop(run):
    """Save this step and raise Stopped."""
    save(run)
    settle(run)
    s, step = run.settings, run.state.step
    folder = os.path.join(s.out_dir, checkpoint.step_name(step))
    how = "run the same command again" if s.resume != "never" else "add --resume=auto"
    number = signal.Signals(run.request.signal or signal.SIGTERM)  # None here if another rank got the signal
    raise Stopped(number, f"{number.name}: saved {folder} after step {step:,}; {how} to go on from there")


def write_cards(run, val_loss):
    """The model cards of the last and of the best checkpoint."""
    s, state = run.settings, run.state
    source = None
    if s.init_from != "scratch":
        with contextlib.suppress(UserError):  # it may be gone by now
            source = checkpoint.find(s.init_from)
    for step, loss in {state.step: val_loss, state.best_step: state.best_val_loss}.items():
        if step is None:
            continue
        folder = os.path.join(s.out_dir, checkpoint.step_name(step))
        if os.path.isdir(folder):
            facts = {"val_loss": loss, "tokens": step * s.batch_tokens, "data": os.path.basename(s.dataset)}
            write_card(folder, os.path.basename(s.out_dir), source, **facts)


@one_line(ranks=True)
def main(argv=None):
    """Command line: plan the run, and carry it out unless it is a dry run."""
    description = "Train a GPT from scratch, from a checkpoint, or from the first blocks of one."
    settings, given = parse((TrainSettings,), argv, description)
    ranks = Ranks(*rank_info())
    if settings.dry_run:
        plan = make_plan(settings, given, ranks.world)
        if ranks.first:
            print(describe(plan, settings))
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(ranks.joined(settings.device))
        device = ranks.agree(lambda: pick(settings.device, ranks.local))
        plan = ranks.once(lambda: make_plan(settings, given, ranks.world))  # rank 0 decides what to resume
        run = stack.enter_context(contextlib.closing(setup(settings, plan, ranks, device)))
        if ranks.first:
            c, n_params = plan.config, run.model.module.num_params()
            epoch = run.data.train.n_windows / plan.sequences
            print(
                f"{c.n_layer} blocks, {n_params:,} parameters, {device}; a step is "
                f"{settings.batch_tokens:,} tokens = {plan.micro_batch} x {c.block_size} x "
                f"{plan.accumulation} accumulation x {ranks.world} rank(s); an epoch is {epoch:,.1f} steps"
            )
            if plan.warning:
                print(plan.warning)
        with run.request:
            val_loss = fit(run)
        if ranks.first:
            write_cards(run, val_loss)
            print(f"done: {settings.out_dir}, step {run.state.step}, val {val_loss:.4f}")


if __name__ == "__main__":
    main()
