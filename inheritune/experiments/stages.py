"""A `Stage` is one run of train.py and what it starts from; `Common` is what an experiment's runs share."""

import dataclasses
import os
import shlex
import sys
import threading
from dataclasses import dataclass, field

import torch

from inheritune.base.errors import UserError, noting, raise_all
from inheritune.base.signals import StopRequest
from inheritune.data.reader import identity
from inheritune.experiments.block_choice import choice_flops, choose_kept
from inheritune.models.initialisations import make_checkpoint
from inheritune.models.open_model import Config
from inheritune.training import planning
from inheritune.training.command_line import parse
from inheritune.training.cost import flops_with_teacher
from inheritune.training.settings import TrainSettings
from inheritune.weights import checkpoint

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# for measurements, because torch's generator and threads belong to the process
ONE_AT_A_TIME = threading.Lock()
# settings that the reference shares with the experiment
SHARED = ("dataset", "eval_tokens", "also_validate", "seed", "device", "dtype", "compile", "threads")
# settings that each stage sets itself
STAGE_DECIDES = ("out_dir", "init_from", "inherit_layers", "resume", "change", "dry_run", "n_layer")


@dataclass(frozen=True)
class Stage:
    """One run of train.py, from random initialisation or from a checkpoint that is made for it first."""

    run: str  # run folder
    config: Config  # of the model it trains
    flags: dict  # for train.py, without out_dir and resume; max_iters and batch_tokens are always there
    # {"ckpt": "out/reference", "layers": 4} → start_folder is made of the reference's first 4 blocks.
    # Other keys are arguments of make_checkpoint, or `choose`, a rule of block_choice.py. {}: none is made
    start_options: dict = field(default_factory=dict)
    config_files: tuple[str, ...] = ()  # of train.py, at most one
    teacher: Config | None = None
    start_flops: float = 0.0  # of choosing the blocks that it starts from

    @property
    def start_folder(self) -> str:
        """Where the checkpoint is made that the run starts from."""
        return self.run + "_start"

    @property
    def settings(self) -> TrainSettings:
        """What train.py will read from the config file and the flags."""
        flags = [f"--{key}={value}" for key, value in self.flags.items()]
        return parse((TrainSettings,), [*self.config_files, *flags], "")[0]

    @property
    def start_text(self) -> list[str]:
        """The start's options as text, for settings_hash (frozen)."""
        text = []
        for key, value in self.start_options.items():
            text += [f"--{key}"] if value is True else [f"--{key}", str(value)]
        return text

    @property
    def steps(self) -> int:
        return self.flags["max_iters"]

    @property
    def flops_per_step(self) -> float:
        """Of training the student, and of the teacher's forward passes."""
        return flops_with_teacher(self.config, self.teacher) * self.flags["batch_tokens"]

    @property
    def flops(self) -> float:
        return self.start_flops + self.steps * self.flops_per_step

    @property
    def layer_steps(self) -> int:
        return self.steps * self.config.n_layer

    def with_flags(self, **flags) -> "Stage":
        return dataclasses.replace(self, flags=self.flags | flags)


@dataclass(frozen=True, eq=False)  # a key of dicts, by identity
class Common:
    """What stages of one experiment share: the arms of one seed, or the runs of grow.py."""

    folder: str  # every arm, or run of grow.py, has a folder of its own in it
    flags: dict  # of train.py for every small model; max_iters, batch_tokens and seed are always among them
    k: int  # blocks of the small models
    config: Config  # of the reference
    reference: str  # the reference's checkpoint, which may be yet to train
    reference_stage: Stage | None  # trains the reference; None: it was given
    # FLOPs and layer-steps of training the reference; None: unknown
    reference_cost: tuple[float | None, int | None] = (None, None)
    rounds: tuple[int, ...] = ()  # depths of the models that grow, in order
    kd: dict = field(default_factory=dict)  # kd_alpha and kd_temperature, where the experiment sets them

    def row_path(self, arm: str) -> str:
        """The path of an arm's row.json, which is there once the arm is done."""
        return os.path.join(self.folder, arm, "row.json")

    def random(self, name: str, n_layer: int | None = None) -> Stage:
        """A Stage that trains n_layer blocks (default: k) from random initialisation in the run folder
        `folder`/`name`."""
        n_layer = n_layer or self.k
        config = self.config.with_blocks(list(range(n_layer)))
        if config.scratch_settings is None:  # inherit.py can make it, train.py cannot
            return self.inherited(name, recipe="random", layers=n_layer)
        return Stage(os.path.join(self.folder, name), config, self.flags | config.scratch_settings)

    def inherited(self, name: str, **options) -> Stage:
        """A Stage that trains what inherit.py makes of the reference with these options, e.g. layers=4,
        recipe="last". ckpt=... takes another source; choose=... is a rule of block_choice.py."""
        start = {"ckpt": self.reference, **options, "seed": self.flags["seed"]}
        n_layer, rule = options.get("layers", self.config.n_layer), options.get("choose")
        config = self.config.with_blocks(list(range(n_layer)))
        flags = self.flags | {"block_size": config.block_size}
        flops = choice_flops(rule, self.config, n_layer) if rule else 0.0
        return Stage(os.path.join(self.folder, name), config, flags, start, start_flops=flops)


def small_flags(settings: TrainSettings, explicit: frozenset) -> dict:
    """The flags of every small model: what the user set (`explicit`) except STAGE_DECIDES, and three more."""
    chosen = explicit - set(STAGE_DECIDES) | {"max_iters", "batch_tokens", "seed"}
    return {key: value for key, value in dataclasses.asdict(settings).items() if key in chosen}


def shared_config(
    name: str, config: Config, settings: TrainSettings, explicit: frozenset, problems: list[str]
) -> Config:
    """The config of the reference `name`, with the context that the user has set, which all stages share.

    Raises UserError with `problems` and with every setting that does not fit the reference.
    """
    named = dataclasses.replace(settings, init_from=name, inherit_layers=None)
    raise_all(problems + planning.inherited_problems(named, explicit - set(STAGE_DECIDES), config))
    return dataclasses.replace(config, block_size=settings.block_size) if "block_size" in explicit else config


def plan_reference(path: str, settings: TrainSettings, explicit: frozenset, run: str, **flags) -> Stage:
    """The Stage that trains a reference as the train.py config file `path` says, in the run folder `run`.

    settings: the experiment's, whose SHARED keys the reference gets too
    explicit: the keys that the user has set
    flags: further settings for train.py

    The data need not be there yet. Raises UserError.
    """
    own, keys = parse((TrainSettings,), [path], "")
    planned = dataclasses.replace(own, dataset=settings.dataset, dry_run=True)
    plan = planning.make_plan(planned, keys, world=1)
    flags = {key: getattr(settings, key) for key in SHARED if key in explicit} | flags
    flags |= {"max_iters": own.max_iters, "batch_tokens": own.batch_tokens}
    return Stage(run, plan.config, flags, config_files=(path,), teacher=plan.teacher)


def run_problems(stages: list[Stage]) -> list[str]:
    """What is wrong with the settings of runs of train.py, before any of them starts: one sentence each."""
    problems = []
    for stage in stages:
        s, config = stage.settings, stage.config
        problems += planning.settings_problems(s) + planning.recompute_problems(s, config)
        world = gpus_of(stage) or 1
        noting(problems, planning.split_batch, s.batch_tokens, config.block_size, s.batch_size, world)
    return list(dict.fromkeys(problems))


def stage_text(stage: Stage) -> str:
    """A run in the text of --dry_run: '4 blocks x 128 for 2,000 steps, 3.2e+13 FLOPs'."""
    shape = f"{stage.config.n_layer} blocks x {stage.config.n_embd}"
    return f"{shape} for {stage.steps:,} steps, {stage.flops:.3g} FLOPs"


def gpus_of(stage: Stage) -> int:
    """How many GPUs torchrun gets for a stage: all, or none for the CPU and a card named by number."""
    return torch.cuda.device_count() if stage.settings.device in ("auto", "cuda") else 0


def train_command(stage: Stage) -> list[str]:
    """The command line of train.py that begins or continues a stage, under torchrun with several GPUs."""
    start = {"init_from": stage.start_folder} if stage.start_options else {}
    flags = stage.flags | start | {"out_dir": stage.run, "resume": "auto"}
    command = [sys.executable, os.path.join(ROOT, "train.py"), *stage.config_files]
    command += [f"--{key}={value}" for key, value in flags.items()]
    gpus = gpus_of(stage)
    if gpus > 1:  # needs a GPU
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        command[:0] = ["env", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600"]  # time to save, where torch knows it
    return command


def make_start(stage: Stage) -> None:
    """Make the checkpoint that a stage starts from. Raises UserError for one that was made otherwise."""
    options = dict(stage.start_options)
    source = checkpoint.find(options.pop("ckpt"))
    made_for = options | {"source": checkpoint.fingerprint(source)["files"]}
    if "choose" in options:
        made_for["data"] = identity(stage.flags["dataset"])
    if "onto" in options:
        made_for["onto"] = checkpoint.fingerprint(options["onto"])["files"]
    if os.path.exists(stage.start_folder):
        if checkpoint.read_lineage(stage.start_folder).get("made_for", made_for) != made_for:
            why = "was made with other options or from another model"
            raise UserError(f"{stage.start_folder} {why}: delete it and {stage.run}, or use another out_dir")
        return
    with ONE_AT_A_TIME:
        if rule := options.pop("choose", None):
            options["blocks"] = choose_kept(rule, source, stage.flags["dataset"], options.pop("layers"))
        make_checkpoint(source, stage.start_folder, notes={"made_for": made_for}, **options)


def run_stage(stage: Stage, request: StopRequest, quiet=False) -> None:
    """Make the checkpoint that a stage starts from, and train to the stage's end.

    quiet: the output of train.py goes to RUN.txt beside the run folder RUN, not to the terminal. Raises
    UserError when train.py fails, and Stopped when `request` asks to end.
    """
    if stage.start_options:
        make_start(stage)
    command, why, again = train_command(stage), "see above", "; run the same command again to go on"
    if quiet:
        os.makedirs(os.path.dirname(stage.run), exist_ok=True)
        with open(stage.run + ".txt", "a+", encoding="utf-8") as f:
            began = f.tell()  # earlier attempts stand before
            status = request.call(command, stdout=f, stderr=f)
            f.seek(began)
            lines = [line.strip() for line in f if line.strip()]
        said = [line for line in lines if line.startswith("train.py: ")]  # torchrun prints lines of its own
        why = f"{(said or lines or ['no output'])[-1]}; see {stage.run}.txt"
        again = "" if said else again  # train.py has said what to do
    else:
        print(f"\n$ {shlex.join(command)}", flush=True)
        status = request.call(command)
    if status:
        raise UserError(f"training {stage.run} did not finish ({why}){again}")
