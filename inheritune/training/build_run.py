"""Builds what train.py's loop needs: data, model, teacher, optimizer, the first state, the run folder."""

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from inheritune.base.errors import UserError
from inheritune.base.files import lock_folder, unlock_folder
from inheritune.base.signals import StopRequest
from inheritune.data.reader import TrainData, ValData
from inheritune.models.initialisations import inherit
from inheritune.models.open_model import load_model, model_class, open_config, open_weights
from inheritune.training.cost import flops_with_teacher
from inheritune.training.device import is_compiled, pick_dtype
from inheritune.training.distributed import DistributedModel, Ranks, seed_all
from inheritune.training.logs import ALSO, Recorder
from inheritune.training.losses import Teacher, pad_head
from inheritune.training.optimizer import load_optimizer, make_optimizer
from inheritune.training.planning import Plan, find_resumable
from inheritune.training.settings import TrainSettings
from inheritune.weights import checkpoint
from inheritune.weights.gpt2_format import read_special_ids


@dataclass
class State:
    """What changes from step to step, besides the weights and the optimizer's state. state.json holds it."""

    step: int = 0  # optimizer steps made
    best_val_loss: float | None = None  # nats/token
    best_step: int | None = None  # of the checkpoint that has it
    since_best: int = 0  # validations made since then
    bad_steps: int = 0  # steps skipped so far because loss or gradient was not finite
    bad_in_a_row: int = 0
    row: dict = field(default_factory=dict)  # loss, lr, grad_norm of the newest step
    changes: list[str] = field(default_factory=list)  # what --change changed: "step 12: max_iters was …"


@dataclass
class Saver:
    """Writes checkpoints in a thread while the training goes on. Only rank 0 hands it work.

    The thread does one piece of work after the other. After a failure it does nothing more, until `finish`
    has raised the error.
    """

    lineage: dict  # for lineage.json
    files: dict[str, bytes]  # that lay beside the model: its chat template, licence, …
    special_ids: dict  # for config.json, of the model that the run started from
    step: int | None  # of the newest checkpoint, written or under way
    copies: dict = field(default_factory=dict)  # the tensors that the thread writes
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    newest: Future | None = None  # of the work that was handed over last
    error: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Have the thread call work()."""
        self.newest = self.pool.submit(self.attempt, work)

    def attempt(self, work):
        if self.error is None:
            try:
                work()
            except Exception as e:
                self.error = e

    def finish(self) -> None:
        """Wait for all work, and raise what went wrong, if anything did."""
        if self.newest:
            self.newest.result()  # of one thread: all that came before is done, too
        error, self.error = self.error, None
        if error:
            raise error


class Run:
    """Everything that train.py's loop needs.

    It is made on every rank. A UserError or OSError of one rank (in the data, the weights, the checkpoint or
    the run folder) is the same AgreedError on all. `agree` runs work on all ranks and shares errors;
    `once_per_node` downloads once for each machine.
    """

    def __init__(self, settings: TrainSettings, plan: Plan, ranks: Ranks, device: torch.device):
        self.settings, self.plan, self.ranks = settings, plan, ranks
        self.request = StopRequest()  # stop signals received by this process
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32
        seed_all(settings.seed)  # frozen: alike on all ranks, which start from the same weights
        dtype, compiled = pick_dtype(settings.dtype, device), is_compiled(settings.compile, device)

        # data, model and teacher; val: {column of log.csv: the data whose loss it shows}
        train, self.val = ranks.agree(lambda: open_data(settings, plan))
        folder = plan.resume_from
        if not folder and settings.init_from != "scratch":
            folder = ranks.once_per_node(lambda: checkpoint.find(settings.init_from))
        module, lineage, files, special_ids = ranks.agree(lambda: load_weights(plan, folder))
        module.checkpoint_activations = settings.checkpoint_activations
        pad_head(module, device, compiled)
        self.model = DistributedModel(module, ranks, device, dtype, compiled, settings.shard)
        self.teacher = None
        if settings.teacher:
            found = ranks.once_per_node(lambda: checkpoint.find(settings.teacher))
            theirs = ranks.agree(lambda: load_model(found))
            pad_head(theirs, device, compiled)
            options = {"device": device, "dtype": dtype, "compiled": compiled}
            self.teacher = Teacher(theirs, settings, n_vocab=train.tokens.tokenizer["n_vocab"], **options)

        # what a checkpoint restores, and the run folder
        self.optimizer = make_optimizer(module, settings, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        restored = ranks.agree(lambda: restore(plan.resume_from, module, self.optimizer, self.scaler))
        self.state, self.ended_at = restored  # ended_at: where a finished run goes on; it validates again
        if plan.changed_now:
            self.state.changes.append(f"step {self.state.step}: {plan.changed_now}")
        flops = flops_with_teacher(plan.config, plan.teacher)
        self.recorder = Recorder(settings, flops, device, ranks.world)
        ranks.agree(lambda: open_run_folder(self) if ranks.is_first else None)

        # this rank's windows, step after step
        self.batches = train.batches(self.state.step, plan.sequences, ranks.rank, ranks.world)
        self.steps_per_epoch = train.n_windows / plan.sequences
        self.saver = Saver(lineage, files, special_ids, self.state.step if plan.resume_from else None)

    def close(self) -> None:
        """Release the run folder, after waiting for what is being written there."""
        self.batches.close()
        self.saver.pool.shutdown()
        self.recorder.close()


def open_data(settings, plan):
    """(TrainData, {column of log.csv: ValData}) of a run."""
    s, T = settings, plan.config.block_size
    train = TrainData(s.dataset, T, s.seed, s.data_start, s.data_end)
    folders = {"val_loss": s.dataset} | ({ALSO: s.also_validate} if s.also_validate else {})
    return train, {name: ValData(f, T, s.eval_tokens, s.batch_size) for name, f in folders.items()}


def load_weights(plan, folder):
    """(model of the plan's config, its lineage, the files beside it, its special ids). Without a folder it is
    random.

    folder: a checkpoint; the model takes its first n_layer blocks
    """
    config = plan.config
    if folder is None:
        return model_class(config)(config), {}, {}, {}
    source = open_config(folder)
    weights, lineage = open_weights(folder, source), checkpoint.read_lineage(folder)
    if not plan.resume_from:
        blocks = list(range(config.n_layer))
        weights, _ = inherit(weights, source, blocks)  # its first blocks
        lineage = checkpoint.new_lineage(folder, blocks, warning=config.warning)
    module = model_class(config).empty(config)
    module.fill(weights, folder)
    # a model that names no tokenizer has taken the data's: its own ids mean nothing there
    special_ids = read_special_ids(folder) if config.tokenizer == source.tokenizer else {}
    return module, lineage, checkpoint.files_beside(folder), special_ids


def restore(folder, module, optimizer, scaler):
    """(the State in a checkpoint folder, its step if that was the run's max_iters), or (a new State, None)
    without a folder. Fills optimizer and scaler from it."""
    if folder is None:
        return State(), None
    load_optimizer(folder, module, optimizer)
    saved = checkpoint.read_state(folder)
    try:
        if scaler.is_enabled() and saved["scaler"] != {}:  # {}: so far trained in another number format
            scaler.load_state_dict(saved["scaler"])
    except (KeyError, RuntimeError, TypeError) as e:
        raise UserError(
            f"{folder}/state.json lacks {e}; delete the folder to go on from the one before"
        ) from None
    ended = saved["step"] if saved["step"] == saved["settings"].get("max_iters") else None
    return State(**{f.name: saved[f.name] for f in dataclasses.fields(State)}), ended


def open_run_folder(run):
    """Lock the run folder, remove what a killed run left in it, and open the recorder at the state's step.

    Raises UserError when another run has the folder, or has written there since the plan was made.
    """
    out, plan, state = run.settings.out_dir, run.plan, run.state
    os.makedirs(out, exist_ok=True)
    lock = lock_folder(out)
    if lock is None:
        cure = "wait for it or stop it, or choose another --out_dir"
        raise UserError(f"another process is training in {out}: {cure}")
    try:
        if find_resumable(run.settings) != (plan.resume_from, plan.damaged):
            raise UserError(f"another process has just trained in {out}: run the same command again to go on")
        for folder, why in plan.damaged.items():
            print(f"{folder} is no whole checkpoint and is set aside: {why}")
            checkpoint.set_aside(folder)

        # a killed run leaves temporary files, links that were not moved yet, and rows after the checkpoint
        checkpoint.sweep(out)
        if plan.resume_from:
            checkpoint.link(os.path.join(out, "latest"), os.path.basename(plan.resume_from))
        best = checkpoint.step_name(state.best_step or 0)
        if state.best_step is not None and os.path.isdir(os.path.join(out, best)):
            checkpoint.link(os.path.join(out, "best"), best)
        run.recorder.open(lock, state.step)
    except BaseException:
        unlock_folder(out, lock)
        raise
