"""Builds a run for train.py's loop: data, model, optimizer, run folder, and the state of a step."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from inheritune.base.errors import UserError
from inheritune.base.files import lock_folder, unlock_folder
from inheritune.base.signals import StopRequest
from inheritune.data.reader import TrainData, ValData
from inheritune.training.cost import flops_per_token
from inheritune.training.device import pick_dtype
from inheritune.training.distributed import DistributedModel, Ranks, seed_all
from inheritune.training.logs import Recorder
from inheritune.training.losses import Teacher, pad_head
from inheritune.training.optimizer import load_optimizer, make_optimizer
from inheritune.training.planning import Plan
from inheritune.training.settings import TrainSettings
from inheritune.weights import checkpoint
from inheritune.weights.gpt2_format import fill, open_model
from inheritune.weights.initialisations import inherit
from model import GPT


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
class Data:
    """The windows that a run reads."""

    train: TrainData
    val: ValData
    batches: Iterator | None = None  # this rank's windows, step after step


@dataclass
class Saver:
    """Writes checkpoints, in a thread, while the training goes on. Only rank 0 hands it work."""

    lineage: dict  # for lineage.json
    step: int | None  # of the newest checkpoint, written or under way
    copies: dict = field(default_factory=dict)  # the tensors that the thread writes
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    newest: Future | None = None  # work handed over last

    def start(self, work: Callable[[], None]) -> None:
        """work() after what was handed over before it; not at all if that failed."""
        before = self.newest

        def in_order():
            if before:
                before.result()
            work()

        self.newest = self.pool.submit(in_order)

    def failed(self) -> bool:
        """Whether work has failed; `finish` raises what it was."""
        return bool(self.newest and self.newest.done() and self.newest.exception())

    def finish(self) -> None:
        """Wait for all work, and raise what went wrong, if anything did."""
        newest, self.newest = self.newest, None
        if newest:
            newest.result()


@dataclass
class Run:
    """Everything that train.py's loop needs."""

    settings: TrainSettings
    plan: Plan
    ranks: Ranks
    model: DistributedModel
    teacher: Teacher | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    data: Data
    state: State
    recorder: Recorder
    saver: Saver
    request: StopRequest = field(default_factory=StopRequest)  # to stop; of this process

    def close(self) -> None:
        """Release the run folder, once nothing is being written there any more."""
        self.data.batches.close()
        self.saver.pool.shutdown()
        self.recorder.close()


def setup(settings: TrainSettings, plan: Plan, ranks: Ranks, device: torch.device) -> Run:
    """Build the Run, on every rank. A failure on any rank is the same AgreedError on all."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs; no effect elsewhere
    seed_all(settings.seed)  # frozen: alike on all ranks, which start from the same weights

    # data, model and teacher
    data = ranks.agree(lambda: open_data(settings, plan))
    folder = plan.resume_from
    if not folder and settings.init_from != "scratch":
        folder = ranks.once_per_node(lambda: checkpoint.find(settings.init_from))
    module, lineage = ranks.agree(lambda: load_weights(plan, folder))
    compiled = device.type == "cuda" if settings.compile is None else settings.compile
    module.checkpoint_activations = settings.checkpoint_activations
    padded = compiled or device.type == "cuda"
    if padded:
        pad_head(module)
    dtype = pick_dtype(settings.dtype, device)
    model = DistributedModel(module, ranks, device, dtype, settings.compile, settings.shard)
    teacher = None
    if settings.teacher:
        found = ranks.once_per_node(lambda: checkpoint.find(settings.teacher))
        theirs, n_vocab = ranks.agree(lambda: GPT.from_pretrained(found)), plan.tokenizer["n_vocab"]
        if padded:
            pad_head(theirs)
        teacher = Teacher(theirs, settings, n_vocab, device, dtype, compiled)

    # what is restored, and the run folder
    optimizer = make_optimizer(module, settings, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = ranks.agree(lambda: restore(plan.resume_from, module, optimizer, scaler))
    recorder = Recorder(settings, flops_per_token(plan.config, plan.teacher), device, ranks.world)
    ranks.agree(lambda: open_run_folder(settings, plan, state, recorder) if ranks.first else None)

    data.batches = data.train.batches(state.step, plan.sequences, ranks.rank, ranks.world)
    saver = Saver(lineage, step=state.step if plan.resume_from else None)
    return Run(settings, plan, ranks, model, teacher, optimizer, scaler, data, state, recorder, saver)


def open_data(settings, plan):
    """The Data of a run. Validation comes in groups of batch_size windows on any number of ranks."""
    T = plan.config.block_size
    train = TrainData(settings.dataset, T, settings.seed, settings.data_start, settings.data_end)
    return Data(train, ValData(settings.dataset, T, settings.eval_tokens, settings.batch_size))


def load_weights(plan, folder):
    """(GPT, lineage) of the plan's config: fresh, or a checkpoint folder's first blocks and positions."""
    if folder is None:
        return GPT(plan.config), {}
    module = GPT.empty(plan.config)
    weights, source = open_model(folder)
    lineage = checkpoint.read_lineage(folder)
    if not plan.resume_from:
        blocks = list(range(plan.config.n_layer))
        weights, _ = inherit(weights, source, blocks)
        wpe = "transformer.wpe.weight"
        weights[wpe] = weights[wpe][: plan.config.block_size]
        lineage = checkpoint.new_lineage(folder, blocks)
    fill(dict(module.named_parameters()), weights, folder)
    return module, lineage


def restore(folder, module, optimizer, scaler):
    """The State of a checkpoint folder, which fills optimizer and scaler; that of step 0 without a folder."""
    if folder is None:
        return State()
    load_optimizer(folder, module, optimizer)
    saved = checkpoint.read_state(folder)
    try:
        if scaler.is_enabled():
            scaler.load_state_dict(saved["scaler"])
    except (KeyError, RuntimeError, TypeError) as e:
        raise UserError(
            f"{folder}/state.json lacks {e}; delete the folder to go on from the one before"
        ) from None
    return State(**{f.name: saved[f.name] for f in dataclasses.fields(State)})


def open_run_folder(settings, plan, state, recorder):
    """Make or take the run folder, clear what a kill left in it, and open the recorder at the state's step.

    Raises UserError when another run has the folder, or had it since the plan was made.
    """
    out = settings.out_dir
    os.makedirs(out, exist_ok=True)
    lock = lock_folder(out)
    if lock is None:
        cure = "wait for it or stop it, or choose another --out_dir"
        raise UserError(f"another process is training in {out}: {cure}")
    try:
        # damaged checkpoints are set aside, unless another run has mended them meanwhile
        for folder in plan.damaged:
            try:
                checkpoint.examine(folder)
            except UserError as e:
                print(f"{folder} is no whole checkpoint and is set aside: {e}")
                checkpoint.set_aside(folder)
        steps = checkpoint.list_steps(out)
        if steps[-1:] != ([os.path.basename(plan.resume_from)] if plan.resume_from else []):
            raise UserError(f"another process has just trained in {out}: run the same command again to go on")

        # what a kill left: temporary files, links that were not moved yet, rows after the checkpoint
        checkpoint.sweep(out)
        if plan.resume_from:
            checkpoint.link(os.path.join(out, "latest"), steps[-1])
        best = checkpoint.step_name(state.best_step or 0)
        if state.best_step is not None and best in steps:
            checkpoint.link(os.path.join(out, "best"), best)
        recorder.open(lock, state.step)
    except BaseException:
        unlock_folder(out, lock)
        raise
