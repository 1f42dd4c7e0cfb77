"""A run, built: model, data, optimizer, logs, and the state that is saved and restored, for train.py's loop."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.nn.parallel import DistributedDataParallel

from inheritune.base.errors import UserError
from inheritune.base.files import lock_folder
from inheritune.base.signals import Request
from inheritune.data.reader import TrainData, ValData
from inheritune.training import device as machine
from inheritune.training import logs as log
from inheritune.training import planning
from inheritune.training.background import Background
from inheritune.training.distributed import Ranks, seed_all
from inheritune.training.optimizer import load_optimizer, make_optimizer
from inheritune.training.settings import TrainSettings
from inheritune.training.shard import shard
from inheritune.weights import checkpoint
from inheritune.weights.gpt2_format import fill, open_model
from inheritune.weights.recipes import inherit
from model import GPT

LOG_COLUMNS = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm")  # reproducible to the last digit
TERMS = ("ce", "kl")  # further columns when there is a teacher: the terms of the loss, before they are weighted
TIMING_COLUMNS = ("step", "tokens_per_s", "mfu", "memory_mb", "train_s", "val_s")


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
    model: GPT  # the module itself, perhaps sharded: saved, and the source of truth
    forward: torch.nn.Module  # what computes: the model, compiled and wrapped in DDP as needed
    sharded: bool
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train: TrainData
    batches: Iterator  # inputs and targets of this rank, step after step
    val: ValData
    state: State
    lineage: dict
    teacher: GPT | None  # in eval mode, for distillation
    lock: int | None  # holds the run folder against other runs; rank 0 only, as are the next three
    log: log.CsvLog | None
    timing: log.CsvLog | None
    sink: object
    first_step: int  # where this process began
    train_s: float = 0.0  # since this process began, without validation and saving
    val_s: float = 0.0
    request: Request = field(default_factory=Request)  # of this process, to end
    stopping: bool = False  # all ranks know that one of them has such a request, or could not write
    background: Background = field(default_factory=Background)  # writes checkpoints
    copies: dict = field(default_factory=dict)  # of the tensors that it writes (optimizer.snapshot)

    def close(self):
        """Let others have the run folder, when nothing is being written there any more."""
        self.batches.close()
        self.background.wait()
        if self.lock is not None:
            os.close(self.lock)


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
    model.checkpoint_activations = settings.checkpoint_activations
    compiled = settings.compile or (settings.compile is None and device.type == "cuda")
    sharded = settings.shard and ranks.world > 1
    shard(model, ranks, device, compiled) if sharded else model.to(device)
    teacher = None
    if settings.teacher:
        found = ranks.once_per_node(lambda: checkpoint.find(settings.teacher))
        teacher = ranks.agree(lambda: GPT.from_pretrained(found)).to(device).eval().requires_grad_(False)
    optimizer = make_optimizer(model, settings, device)
    dtype = machine.pick_dtype(settings.dtype, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = State()
    if plan.resume_from:
        state = ranks.agree(lambda: restore(folder, model, optimizer, scaler))

    logs = ranks.agree(lambda: open_run_folder(settings, state, plan) if ranks.first else (None, None, None, None))
    forward = model
    if compiled and not sharded:
        forward = torch.compile(forward)
    if ranks.world > 1 and not sharded:
        ids = [device.index] if device.type == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids=ids, gradient_as_bucket_view=True)  # no second copy
    return Run(
        settings=settings,
        plan=plan,
        ranks=ranks,
        device=device,
        dtype=dtype,
        model=model,
        forward=forward,
        sharded=sharded,
        optimizer=optimizer,
        scaler=scaler,
        train=train,
        batches=train.batches(state.step, plan.sequences, ranks.rank, ranks.world),
        val=val,
        state=state,
        lineage=lineage,
        teacher=teacher,
        lock=logs[0],
        log=logs[1],
        timing=logs[2],
        sink=logs[3],
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
    parameters = dict(model.named_parameters())
    if folder is None:
        return model, {}
    weights, source = open_model(folder)
    if plan.resume_from:
        fill(parameters, weights, folder)
        return model, checkpoint.read_lineage(folder)
    blocks = list(range(plan.config.n_layer))
    state, _ = inherit(weights, source, blocks)
    wpe = "transformer.wpe.weight"
    state[wpe] = state[wpe][: plan.config.block_size]
    fill(parameters, state, folder)
    return model, checkpoint.new_lineage(folder, blocks)


def restore(folder, model, optimizer, scaler):
    """Fill optimizer and scaler from a checkpoint folder and return its State. Raises UserError."""
    load_optimizer(folder, model, optimizer)
    saved = checkpoint.read_state(folder)
    try:
        if scaler.is_enabled():
            scaler.load_state_dict(saved["scaler"])
    except (KeyError, RuntimeError, TypeError) as e:
        raise UserError(f"{folder}/state.json lacks {e}; delete the folder to go on from the one before it") from None
    return State(**{f.name: saved[f.name] for f in dataclasses.fields(State)})


def open_run_folder(settings, state, plan):
    """Make or take the run folder, clear what a kill left in it, open (lock, log, timing, sink) at the state's step.

    Raises UserError when another run has it, or had it since the plan was made.
    """
    out = settings.out_dir
    os.makedirs(out, exist_ok=True)
    lock = lock_folder(out)
    if lock is None:
        raise UserError(f"another process is training in {out}: wait for it or stop it, or choose another --out_dir")
    try:
        for folder in plan.damaged:
            try:
                checkpoint.examine(folder)  # again: another run may have mended it meanwhile
            except UserError as e:
                print(f"{folder} is no whole checkpoint and is set aside: {e}")
                checkpoint.set_aside(folder)
        newest = checkpoint.list_steps(out)[-1:]
        if newest != ([os.path.basename(plan.resume_from)] if plan.resume_from else []):
            raise UserError(f"another process has just trained in {out}: run the same command again to go on")
        checkpoint.sweep(out)
        if plan.resume_from:
            checkpoint.link(out, "latest", state.step)
            if state.best_step is not None and checkpoint.step_name(state.best_step) in checkpoint.list_steps(out):
                checkpoint.link(out, "best", state.best_step)
        last_step = state.step if plan.resume_from else -1
        columns = {"log.csv": LOG_COLUMNS + TERMS if settings.teacher else LOG_COLUMNS, "timing.csv": TIMING_COLUMNS}
        logs = [log.CsvLog(os.path.join(out, name), names, last_step) for name, names in columns.items()]
        return lock, *logs, log.open_sink(settings.log_to, out, dataclasses.asdict(settings))
    except BaseException:
        os.close(lock)
        raise
