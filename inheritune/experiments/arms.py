"""The arms of the comparison: the runs of train.py that make each, and what they start from (app. D).

An arm is one way to get a small model, or a control. All arms of a seed see the same data in the same order
and are validated on the same tokens. A `Stage` is one run of train.py, `Common` is what all runs of a seed
share, and ARMS is the list. `find_arm("inheritune@max_iters=500")` gives an arm with settings of its own.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from inheritune.base.errors import UserError, nearest
from inheritune.experiments.block_choice import choice_flops
from inheritune.models.interface import Config
from inheritune.training import planning
from inheritune.training.command_line import parse
from inheritune.training.cost import flops_per_token
from inheritune.training.settings import MACHINE, TrainSettings
from inheritune.weights.checkpoint import fingerprint

SHARED = ("dataset", "eval_tokens", "seed", "device", "dtype", "compile", "threads")  # with the reference
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}  # their names in labels
TEACHER = "reference"  # the only teacher of a comparison: ends@teacher=reference
DECIDED = ("out_dir", "init_from", "inherit_layers", "resume", "dry_run", "n_layer")  # by each stage
# by the arms of a comparison, which all train on the same data and to the end
FIXED = (*DECIDED, "teacher", "seed", "dataset", "data_start", "data_end", "stop_at_val_loss")


@dataclass(frozen=True)
class Stage:
    """One run of train.py, from random initialisation or from a checkpoint that is made for it first."""

    run: str  # run folder
    config: Config  # of the model it trains
    flags: dict  # for train.py, without out_dir and resume; max_iters and batch_tokens are always there
    inherit: dict = field(default_factory=dict)  # inherit.py's flags that make its start; {}: no such start
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
    def inherit_flags(self) -> list[str]:
        """The command line of inherit.py that makes the start."""
        pairs = [
            (f"--{key}",) if value is True else (f"--{key}", str(value))
            for key, value in self.inherit.items()
        ]
        return [part for pair in pairs for part in pair]

    @property
    def steps(self) -> int:
        return self.flags["max_iters"]

    @property
    def flops_per_step(self) -> float:
        """Of training the student, and of the teacher's forward passes."""
        return flops_per_token(self.config, self.teacher) * self.flags["batch_tokens"]

    @property
    def flops(self) -> float:
        return self.start_flops + self.steps * self.flops_per_step

    @property
    def layer_steps(self) -> int:
        return self.steps * self.config.n_layer

    def with_flags(self, **flags) -> "Stage":
        return dataclasses.replace(self, flags=self.flags | flags)


@dataclass(frozen=True)
class Common:
    """What all arms of one seed share."""

    folder: str  # every arm has a folder of its own in it
    flags: dict  # of train.py for every small model; max_iters, batch_tokens and seed are always among them
    k: int  # blocks of the small models
    config: Config  # of the reference
    reference: str  # the reference's checkpoint, which may be yet to train
    reference_stage: Stage | None  # trains the reference; None: it was given
    reference_flops: float | None = None  # of training the reference; None: unknown
    reference_layer_steps: int | None = None
    rounds: tuple[int, ...] = ()  # depths of the arms that grow; the last one is k
    kd: dict = field(default_factory=dict)  # kd_alpha and kd_temperature, where the experiment sets them
    seen: float = 1.0  # all arms but `unseen` train on this first part of the stream

    def random(self, run: str, n_layer: int | None = None) -> Stage:
        """A Stage that trains n_layer blocks (default: k) from random initialisation in the run folder `run`,
        a path relative to `folder`."""
        n_layer = n_layer or self.k
        config = self.config.with_blocks(list(range(n_layer)))
        if config.scratch_settings is None:  # inherit.py can make it, train.py cannot
            return self.inherited(run, recipe="random", layers=n_layer)
        return Stage(os.path.join(self.folder, run), config, self.flags | config.scratch_settings)

    def inherited(self, run: str, **options) -> Stage:
        """A Stage that trains what inherit.py makes of the reference with these options, e.g. layers=4,
        recipe="last". ckpt=... takes another source."""
        inherit = {"ckpt": self.reference, **options, "seed": self.flags["seed"]}
        n_layer = options.get("layers", self.config.n_layer)
        config = self.config.with_blocks(list(range(n_layer)))
        flags = self.flags | {"block_size": config.block_size}
        return Stage(os.path.join(self.folder, run), config, flags, inherit)


def trained_reference(c, folder):
    if c.reference_stage is None:
        return []
    return [dataclasses.replace(c.reference_stage, run=os.path.join(c.folder, folder, "run"))]


def random_2x(c, run):
    return c.random(run).with_flags(max_iters=2 * c.flags["max_iters"], lr_decay_iters=None)


def random_matched(c, run):
    """Random initialisation for as many steps as cost what the reference and Inheritune cost together."""
    small = c.random(run)
    steps = round(c.reference_flops / small.flops_per_step) + small.steps
    return small.with_flags(max_iters=steps, lr_decay_iters=None)


def half_width(c, run):
    n_head = c.config.n_head // 2
    narrow = {"n_head": n_head, "n_embd": n_head * (c.config.n_embd // c.config.n_head)}
    stage = c.inherited(run, recipe="half_width")
    return dataclasses.replace(stage, config=dataclasses.replace(stage.config, **narrow))


def stacking(c, folder):
    """Train half of the blocks, then two copies of them, one on top of the other."""
    half = c.random(f"{folder}/stage_1", c.k // 2)
    source = os.path.join(half.run, "latest")
    return [half, c.inherited(f"{folder}/stage_2", ckpt=source, recipe="stack", layers=c.k)]


def growing(c, folder, onto):
    """A Stage for each round, with all blocks from the reference or, onto the model just trained, its next
    ones."""
    stages = []
    for k in c.rounds:
        more = {"onto": os.path.join(stages[-1].run, "latest")} if onto and stages else {}
        stages.append(c.inherited(f"{folder}/round_{k:02}", layers=k, **more))
    return stages


@dataclass(frozen=True)
class Kind:
    """An entry of ARMS."""

    label: str  # in tables and legends
    stages: Callable[[Common, str], list[Stage]]  # of the Common and the arm's folder in it
    from_reference: bool = True  # whether it starts or learns from the reference
    longer: str = ""  # it is this arm trained for more steps


def one_run(label, make_stage, **facts):
    """A Kind with a single Stage, which make_stage(common, run) gives."""
    return Kind(label, lambda c, folder: [make_stage(c, f"{folder}/run")], **facts)


def first_k(label, **options):
    """A Kind that trains what inherit.py makes of k blocks with these options."""
    return one_run(label, lambda c, run: c.inherited(run, layers=c.k, **options))


def chosen(label, rule):
    """A Kind that trains the k blocks which a rule of block_choice.py chooses on the training data."""

    def make_stage(c, run):
        stage = c.inherited(run, layers=c.k, choose=rule)
        return dataclasses.replace(stage, start_flops=choice_flops(rule, c.config, c.k))

    return one_run(label, make_stage)


def distilled(c, stage):
    """The Stage with the reference as its teacher."""
    flags = c.kd | stage.flags | {"teacher": c.reference}
    return dataclasses.replace(stage, flags=flags, teacher=c.config)


def kd_inherit(c, run):
    return distilled(c, c.inherited(run, layers=c.k))


def whole(c, run):
    return c.inherited(run, layers=c.config.n_layer)


def unseen(c, run):
    return c.inherited(run, layers=c.k).with_flags(data_start=c.seen, data_end=1.0)


ARMS = {
    "reference": Kind("reference", trained_reference, from_reference=False),
    "random": one_run("random init", Common.random, from_reference=False),
    "random_2x": one_run("random init, twice the steps", random_2x, from_reference=False, longer="random"),
    "random_matched": one_run(
        "random init, compute of reference + Inheritune",
        random_matched,
        from_reference=False,
        longer="random",
    ),
    "inheritune": first_k("Inheritune"),
    "released_slice": first_k("authors' released slice", released_slice=True),
    "half_width": one_run("half width", half_width),
    "stacking": Kind("stacking", stacking, from_reference=False),
    "hybrid": first_k("hybrid stacking", recipe="hybrid"),
    "last": first_k("last k", recipe="last"),
    "middle": first_k("middle k", recipe="middle"),
    "alternate": first_k("every second", recipe="alternate"),
    "first_plus_last": first_k("first k-1 and the last", recipe="first_plus_last"),
    "ends": first_k("first and last half of k", recipe="ends"),
    "influence": chosen("highest block influence", "influence"),
    "consecutive": chosen("without the consecutive blocks that turn least", "consecutive"),
    "greedy": chosen("greedy by loss", "greedy"),
    "whole": one_run("the whole reference, trained on", whole),
    "kd": one_run("distillation", lambda c, run: distilled(c, c.random(run))),
    "kd_inherit": one_run("distillation + Inheritune", kd_inherit),
    "attn": first_k("attention only", parts="attn"),
    "mlp": first_k("MLP only", parts="mlp"),
    "attn_mlp": first_k("attention + MLP, no LayerNorms", parts="attn+mlp", layernorms=False),
    "rounds": Kind("Inheritune, by rounds", functools.partial(growing, onto=False)),
    "onto": Kind("growth onto the trained model", functools.partial(growing, onto=True)),
    "unseen": one_run("Inheritune, data unseen by reference", unseen),
}


# these take parts of GPT-2's blocks and tensors, by their names
PARTS_OF_GPT2 = ("released_slice", "half_width", "attn", "mlp", "attn_mlp")


@dataclass(frozen=True, eq=False)  # find_arm makes one Arm for each name
class Arm:
    """One of ARMS, perhaps with settings of its own: NAME@key=value@…"""

    name: str  # "inheritune@max_iters=500@optimizer=muon", also the arm's folder
    base: str  # "inheritune", a key of ARMS
    changes: dict  # {"max_iters": 500, "optimizer": "muon"}

    @property
    def kind(self) -> Kind:
        return ARMS[self.base]

    @property
    def from_reference(self) -> bool:
        """Whether it starts or learns from the reference."""
        return self.kind.from_reference or "teacher" in self.changes

    @property
    def label(self) -> str:
        """'Inheritune, 500 steps, Muon'. Settings of the machine change no number and are left out, as is
        min_lr beside learning_rate."""
        hidden = MACHINE | ({"min_lr"} if "learning_rate" in self.changes else set())
        told = [change_label(key, value) for key, value in self.changes.items() if key not in hidden]
        return ", ".join([self.kind.label, *told])

    def stages(self, c: Common) -> list[Stage]:
        """The runs of train.py that make it; none for a reference that was given."""
        changes = self.changes
        if "max_iters" in changes:
            changes = {"lr_decay_iters": None} | changes  # the schedule ends with the run
        reference_stage = c.reference_stage and c.reference_stage.with_flags(**changes)
        c = dataclasses.replace(c, flags=c.flags | changes, reference_stage=reference_stage)
        stages = self.kind.stages(c, self.name)
        return [distilled(c, s) for s in stages] if "teacher" in self.changes else stages


@functools.cache
def find_arm(name: str) -> Arm:
    """The Arm called `name`: inheritune@max_iters=500@optimizer=muon is Inheritune for 500 steps with Muon.
    Raises UserError."""
    base, *changes = name.split("@")
    if base not in ARMS:
        raise UserError(f"arms: there is no arm {base!r}{nearest(base, ARMS)}; they are {', '.join(ARMS)}")
    settings, changed = parse((TrainSettings,), [f"--{change}" for change in changes], "")
    if settings.teacher not in ("", TEACHER) or (settings.teacher and base == "reference"):
        raise UserError(f"arms: {name}: only small models learn, and from teacher={TEACHER}")
    if fixed := sorted(changed & set(FIXED) - {"teacher"}):
        raise UserError(f"arms: {name} sets {', '.join(fixed)}, which the arms decide: leave it out")
    keys = dict.fromkeys(change.partition("=")[0].replace("-", "_") for change in changes)
    return Arm(name, base, {key: getattr(settings, key) for key in keys})


def change_label(key: str, value) -> str:
    """A changed setting in a label: '500 steps', 'lr 0.008', 'Muon'."""
    if key == "max_iters":
        return f"{value:,} steps"
    if key == "batch_tokens":
        return f"{value:,} tokens a step"
    if key == "learning_rate":
        return f"lr {value:g}"
    if key == "teacher":
        return "distillation"
    return OPTIMIZERS[value] if key == "optimizer" else f"{key} {value}"


def parse_arms(text: str) -> dict[Arm, int]:
    """{arm: number of seeds} of a text such as "all:1 random:3", in the order of ARMS; a variant comes behind
    what it varies. Later entries replace earlier ones, and the reference gets as many seeds as any other arm.
    Raises UserError."""
    seeds = {}
    for part in text.replace(",", " ").split():
        name, _, count = part.partition(":")
        if count and not count.isdecimal():
            raise UserError(f"arms: {part!r} is not NAME:SEEDS")
        for each in ARMS if name == "all" else [name]:
            seeds[find_arm(each)] = int(count or 1)
    reference = find_arm("reference")
    seeds[reference] = max(seeds.values(), default=0)
    places = list(ARMS)
    ordered = sorted(seeds, key=lambda arm: (places.index(arm.base), bool(arm.changes)))
    return {arm: seeds[arm] for arm in ordered if seeds[arm]}


def impossible(c: Common) -> dict[str, str]:
    """{key of ARMS: why it cannot be made} with this Common."""
    reasons = {}
    if c.reference_stage is None:
        reasons["unseen"] = "nobody knows which data the given reference saw"
    elif c.seen == 1:
        reasons["unseen"] = "the reference sees all data: set seen below 1"
    if c.reference_flops is None:
        reasons["random_matched"] = "the reference's training compute is unknown"
    if c.k % 2:
        reasons |= dict.fromkeys(("stacking", "hybrid"), f"{c.k} blocks are not twice a whole number")
    if c.config.n_head == 1:
        reasons["half_width"] = "it needs two heads"
    if c.config.scratch_settings is None:
        reasons |= dict.fromkeys(PARTS_OF_GPT2, "of this model only whole blocks can be taken")
    return reasons


def small_flags(settings: TrainSettings, given: frozenset) -> dict:
    """The flags of every small model: what was set for the experiment, without what each stage decides."""
    chosen = given - set(DECIDED) | {"max_iters", "batch_tokens", "seed"}
    return {key: value for key, value in dataclasses.asdict(settings).items() if key in chosen}


def plan_reference(path: str, settings: TrainSettings, given: frozenset, run: str, **flags) -> Stage:
    """The Stage that trains a reference as the train.py config file `path` says, in the run folder `run`.

    settings, given: the experiment's, whose SHARED keys the reference gets too; flags: further ones. The data
    need not be there yet. Raises UserError.
    """
    own, keys = parse((TrainSettings,), [path], "")
    planned = dataclasses.replace(own, dataset=settings.dataset, dry_run=True)
    config = planning.make_plan(planned, keys, world=1).config
    flags = {key: getattr(settings, key) for key in SHARED if key in given} | flags
    flags |= {"max_iters": own.max_iters, "batch_tokens": own.batch_tokens}
    return Stage(run, config, flags, config_files=(path,))


def settings_hash(c: Common, arm: Arm) -> str:
    """A short hash of all that decides an arm's numbers: the settings of its stages, and of the reference if
    it starts from that. Settings at their default are left out, so that a new setting changes no hash."""
    # frozen: results/*/results.csv holds these hashes, and an arm made again must get the same one
    defaults = dataclasses.asdict(TrainSettings())
    content = []
    for stage in arm.stages(c) + (find_arm("reference").stages(c) if arm.from_reference else []):
        settings = dataclasses.asdict(stage.settings)
        chosen = {k: v for k, v in settings.items() if v != defaults[k] and k not in MACHINE}
        content.append([sorted(chosen.items()), stage.inherit_flags])
    if arm.from_reference and c.reference_stage is None:
        content.append(fingerprint(c.reference))
    text = json.dumps(content).replace(c.reference, "reference").replace(c.folder, "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_stages(stages: list[Stage]) -> list[str]:
    """What is wrong with the settings of runs of train.py, before any of them starts: one sentence each."""
    problems = []
    for stage in stages:
        settings = stage.settings
        found = planning.check_settings(settings)
        try:
            planning.split_batch(settings.batch_tokens, stage.config.block_size, settings.batch_size, 1)
        except UserError as e:
            found.append(str(e))
        problems += found
    return list(dict.fromkeys(problems))
