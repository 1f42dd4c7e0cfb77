"""Train a GPT: from scratch, from a checkpoint, or from the first blocks of one.

    python train.py config/replicate_mini_reference.py --seed=2
    torchrun --nproc_per_node=8 train.py config/inheritune_gpt2_large.py

`Run` (inheritune/training/build_run.py) holds everything that a run needs, and `fit` is the loop. When a
checkpoint is due, the state is saved before anything else happens at that step. So a killed run goes on from
there (--resume=auto) exactly as if it had not been killed.

Four things to know before the loop: `run.saver` writes checkpoints in a thread, and keeps its error until
`finish`. `ranks.agree(work)` runs work on every rank, and raises one rank's error on all.
`run.request.signal` is the stop signal that came, or None. A validation that is told to stop has no loss.
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
from inheritune.base.signals import ended_after
from inheritune.data.tokenizer import tokenizer_files
from inheritune.training.build_run import Run
from inheritune.training.command_line import parse
from inheritune.training.device import autocast, dtype_text, pick
from inheritune.training.distributed import AgreedError, Ranks, seed_all
from inheritune.training.logs import TERMS
from inheritune.training.losses import mean_loss, to_device
from inheritune.training.optimizer import snapshot
from inheritune.training.planning import make_plan, plan_text
from inheritune.training.schedule import learning_rate
from inheritune.training.settings import TrainSettings
from inheritune.weights import checkpoint
from inheritune.weights.model_card import write_card

MAX_BAD_STEPS = 10  # non-finite steps in a row that a run survives


def fit(run: Run) -> float:
    """Train until max_iters, stop_at_val_loss or stop_after_worse; returns the last validation loss
    (nats/token).

    Raises Stopped, with the state saved, when any rank was asked to stop; AgreedError when a checkpoint could
    not be written, or too many steps in a row were not finite.
    """
    s, state = run.settings, run.state
    save_interval = s.save_interval or s.eval_interval
    while True:
        last = state.step >= s.max_iters
        if state.step > 0 and (state.step % save_interval == 0 or last):
            save_checkpoint(run)
        due = state.step % s.eval_interval == 0 or last or state.step == run.ended_at
        val_losses = validate(run) if due else {}
        run.recorder.report(state.step, state.row, val_losses)
        val_loss = val_losses.get("val_loss")
        reached = None not in (s.stop_at_val_loss, val_loss) and val_loss <= s.stop_at_val_loss
        # step 0 is saved, and can be the best, only if the run ends there
        is_candidate = val_loss is not None and (state.step > 0 or reached)
        worse = is_candidate and keep_best(run, val_loss)
        if last or reached or worse:
            save_checkpoint(run)
            wait_for_checkpoint(run)
            return val_loss
        train_step(run)


def train_step(run: Run) -> None:
    """One optimizer step on one global batch. The new state.row says what it was like.

    The loss is the mean over all tokens of the batch on all ranks. If it or the gradient is not finite, no
    rank updates anything; MAX_BAD_STEPS such steps in a row raise AgreedError.
    """
    s, plan, state, ranks, model = run.settings, run.plan, run.state, run.ranks, run.model
    began = time.perf_counter()
    lr = learning_rate(state.step, s)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["rate"]  # rate: 1, or what layer_lr_decay makes of it

    # forward and backward, micro-batch by micro-batch: gradients add up to those of the whole batch
    windows = next(run.batches)  # (micro_batch · accumulation, T + 1); a thread reads the next step's
    sums = torch.zeros(3 if run.teacher else 1, device=model.device)  # loss; with a teacher also CE and KL
    for m in range(plan.accumulation):
        x, y = to_device(windows[m * plan.micro_batch : (m + 1) * plan.micro_batch], model.device)
        if s.dropout:
            seed_all(s.seed, state.step, m, ranks.rank)  # frozen: the seeds of dropout
        with model.micro_batch(last=m == plan.accumulation - 1):  # DDP averages in the last one only
            losses = forward(run, x, y)
            # divided here, as each backward pass adds its gradients to those before
            run.scaler.scale(losses[0] / plan.accumulation).backward()
        sums += torch.stack(losses).detach()  # stays on the device: reading it would wait for the GPU
    run.scaler.unscale_(run.optimizer)  # fp16 gradients were scaled up, and would be clipped too early
    grad_norm = model.clip_gradients(s.grad_clip)

    # One all-reduce tells every rank the mean losses, and whether any rank wants to stop
    # (by a signal, or by a checkpoint that could not be written)
    stopping = torch.tensor([float(run.request.signal is not None or run.saver.error is not None)])
    shared = torch.cat((sums.cpu() / plan.accumulation, stopping))
    loss, *terms, stopping = (ranks.sum(shared, model.device) / ranks.world).tolist()

    # update; loss and gradient norm are the same on every rank, so all ranks decide alike
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

    if not finite and ranks.is_first:
        print(f"step {state.step}: loss {loss}, gradient norm {grad_norm}: no update made")
    if state.bad_in_a_row >= MAX_BAD_STEPS:
        raise AgreedError(
            f"{MAX_BAD_STEPS} steps in a row without a finite loss and gradient: lower learning_rate; if "
            f"{s.out_dir} holds a checkpoint, continue it by --resume=auto --change"
        )
    if stopping:
        stop(run)


def forward(run: Run, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The losses of ids x with targets y, (B, T) each: (loss,), or with a teacher (loss, CE, KL)."""
    model, teacher = run.model, run.teacher
    with autocast(model.device, model.autocast_dtype):
        if teacher is None:
            return (model.forward(x, y),)
        # before the student's forward pass, so that their activations are not in memory together
        teacher_logits = teacher.logits(x)
        return teacher.loss(model.forward(x), teacher_logits, y)


def validate(run: Run) -> dict[str, float]:
    """{column of log.csv: loss in nats/token}: {"val_loss": 3.14}; with also_validate also "also_val_loss".

    Saves and stops if a rank is asked to meanwhile.
    """
    began, model, ranks = time.perf_counter(), run.model, run.ranks
    with model.validating() as local_forward:
        options = ranks, model.device, model.autocast_dtype, lambda: ranks.any(run.request.signal is not None)
        losses = {name: mean_loss(local_forward, data, *options) for name, data in run.val.items()}
    run.recorder.validated(time.perf_counter() - began)
    if None in losses.values():
        stop(run)
    return losses


def save_checkpoint(run: Run) -> None:
    """Copy this step's state. Rank 0 writes it as a checkpoint and deletes old ones while training goes on.

    Waits for the previous checkpoint and raises its error. A step is saved once.
    """
    s, state, saver = run.settings, run.state, run.saver
    if saver.step == state.step:
        return
    wait_for_checkpoint(run)
    saver.step = state.step
    copies = saver.copies if run.ranks.is_first else None  # reused; other ranks only help to gather
    parameters, optimizer = snapshot(run.model.module, run.optimizer, copies)
    if not run.ranks.is_first:
        return
    config, best_step = run.plan.config, state.best_step
    state_json = dataclasses.asdict(state) | {
        "row": {k: repr(v) for k, v in state.row.items()},  # may be nan or inf, for which JSON has no number
        "tokens": state.step * s.batch_tokens,
        "scaler": run.scaler.state_dict(),
        "data": run.plan.data_id,
        "settings": dataclasses.asdict(s),
    }

    def write():
        weights = config.arrange(parameters)  # in the folder's layout
        config_json = config.content() | saver.special_ids
        files = tokenizer_files(config, s.dataset) | saver.files  # so that AutoTokenizer opens the checkpoint
        checkpoint.write_step(s.out_dir, weights, optimizer, config_json, state_json, saver.lineage, files)
        checkpoint.prune(s.out_dir, s.keep_last, best_step)

    saver.start(write)


def wait_for_checkpoint(run: Run) -> None:
    """Wait until the checkpoint under way is whole. What went wrong with it is raised on all ranks."""
    run.ranks.agree(run.saver.finish)


def keep_best(run, val_loss):
    """If this validation loss is below all earlier ones, save this step, and let `best` point at it. Returns
    whether stop_after_worse ends the run here."""
    state = run.state
    best = math.inf if state.best_val_loss is None else state.best_val_loss
    if val_loss < best:  # never true of nan
        save_checkpoint(run)
        state.best_val_loss, state.best_step, state.since_best = val_loss, state.step, 0
        if run.ranks.is_first:
            link, name = os.path.join(run.settings.out_dir, "best"), checkpoint.step_name(state.step)
            run.saver.start(functools.partial(checkpoint.link, link, name))
        return False
    if state.since_best + 1 >= (run.settings.stop_after_worse or math.inf):
        return True  # saved before this one is counted: a resumed run validates again
    state.since_best += 1
    return False


def stop(run):
    """Save this step and raise Stopped, or the AgreedError of a checkpoint that could not be written."""
    save_checkpoint(run)
    wait_for_checkpoint(run)
    s, step = run.settings, run.state.step
    folder = os.path.join(s.out_dir, checkpoint.step_name(step))
    cure = "run the same command again" if s.resume != "never" else "add --resume=auto"
    number = signal.Signals(run.request.signal or signal.SIGTERM)  # None here if another rank got the signal
    raise Stopped(number, f"{number.name}: saved {folder} after step {step:,}; {cure} to go on from there")


def write_cards(run, val_loss):
    """Write the model cards of the last and of the best checkpoint."""
    s, state = run.settings, run.state
    source = None
    if s.init_from != "scratch":
        with contextlib.suppress(UserError):  # it may be gone by now
            source = checkpoint.find(s.init_from)
    for step, loss in {state.best_step or 0: state.best_val_loss, state.step: val_loss}.items():
        folder = os.path.join(s.out_dir, checkpoint.step_name(step))
        if os.path.isdir(folder):
            facts = {"val_loss": loss, "tokens": step * s.batch_tokens, "data": os.path.basename(s.dataset)}
            if changes := checkpoint.read_state(folder)["changes"]:
                facts["changes"] = "; ".join(changes)
            write_card(folder, os.path.basename(s.out_dir), source, **facts)


def draw_losses(out_dir):
    """Draw log.csv as loss.png in the run folder."""
    from inheritune.experiments.plots import plot_run  # matplotlib takes a second to import

    plot_run(out_dir)


@one_line(ranks=True)
def main(argv=None):
    """Command line: plan the run, and carry it out unless it is a dry run."""
    description = "Train a GPT from scratch, from a checkpoint, or from the first blocks of one."
    settings, explicit = parse((TrainSettings,), argv, description)
    ranks = Ranks(*rank_info())
    if settings.dry_run:
        plan = make_plan(settings, explicit, ranks.world)
        if ranks.is_first:
            print(plan_text(plan, settings))
        return
    with contextlib.ExitStack() as stack:
        hours = settings.max_hours if ranks.is_first else None  # the others are told
        stack.enter_context(ended_after(hours))
        stack.enter_context(ranks.joined(settings.device))
        device = ranks.agree(lambda: pick(settings.device, ranks.local))
        plan = ranks.once(lambda: make_plan(settings, explicit, ranks.world))  # rank 0 decides what to resume
        run = stack.enter_context(contextlib.closing(Run(settings, plan, ranks, device)))
        if ranks.is_first:
            c, n_params = plan.config, run.model.module.num_params()
            print(
                f"{c.n_layer} blocks, {n_params:,} parameters, {device}, "
                f"{dtype_text(settings.dtype, device)}; a step is "
                f"{settings.batch_tokens:,} tokens = {plan.micro_batch} x {c.block_size} x "
                f"{plan.accumulation} accumulation x {ranks.world} rank(s); "
                f"an epoch is {run.steps_per_epoch:,.1f} steps"
            )
            if plan.changed_now:
                print(f"from step {run.state.step} with other settings: {plan.changed_now}")
        with run.request:
            val_loss = fit(run)
        if ranks.is_first:
            write_cards(run, val_loss)
            print(f"done: {settings.out_dir}, step {run.state.step}, val {val_loss:.4f}")
            draw_losses(settings.out_dir)


if __name__ == "__main__":
    main()
