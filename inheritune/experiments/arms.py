"""The arms of the comparison: the runs of train.py that make each, and what they start from (paper, App. D).

An arm is one way to get a small model, or a control. All arms of a seed see the same data in the same order
and are validated on the same tokens. `Stage` is one run of train.py, `Common` what all runs of a seed share,
ARMS the list.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from inheritune.base.errors import UserError, nearest
from inheritune.training.command_line import parse
from inheritune.training.cost import flops_per_token
from inheritune.training.planning import make_plan
from inheritune.training.settings import MACHINE, TrainSettings
from inheritune.weights.checkpoint import fingerprint
from model import ARCHITECTURE, GPTConfig

SHARED = ("dataset", "eval_tokens", "seed", "device", "dtype", "compile", "threads")  # also the reference's
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}  # as labels have them
DECIDED = ("out_dir", "init_from", "inherit_layers", "resume", "dry_run", "n_layer")  # by each stage
# by the arms of a comparison: all train on the same data, to the end
FIXED = (*DECIDED, "teacher", "seed", "dataset", "data_start", "data_end", "stop_at_val_loss")


@dataclass(frozen=True)
class Stage:
    """One run of train.py: from random init, or from a model that is made first."""

    run: str  # run folder
    config: GPTConfig  # of the model it trains
    flags: dict  # train.py's, all but out_dir and resume; max_iters and batch_tokens are always there
    start: dict = field(default_factory=dict)  # inherit.py's flags that make what it starts from; {}: none
    start_folder: str = ""  # where that is made
    files: tuple = ()  # train.py's config file, at most one
    teacher: GPTConfig | None = None

    @property
    def steps(self) -> int:
        return self.flags["max_iters"]

    @property
    def flops_per_step(self) -> float:
        """Of the student's training and the teacher's forward passes."""
        return flops_per_token(self.config, self.teacher) * self.flags["batch_tokens"]

    @property
    def flops(self) -> float:
        return self.steps * self.flops_per_step

    @property
    def layer_steps(self) -> int:
        return self.steps * self.config.n_layer


@dataclass(frozen=True)
class Common:
    """What all arms of one seed share."""

    folder: str  # every arm has a folder of its own in it
    flags: dict  # train.py's for every small model; max_iters, batch_tokens and seed are always among them
    k: int  # blocks of the small models
    config: GPTConfig  # of the reference
    reference: str  # its checkpoint, also when it is yet to be trained
    reference_flags: dict | None  # that train it; None for a reference that was given
    reference_files: tuple = ()
    reference_flops: float | None = None  # of its own training; None when unknown
    reference_layer_steps: int | None = None
    rounds: tuple = ()  # depths of the arms that grow, the last one k
    kd: dict = field(default_factory=dict)  # kd_alpha and kd_temperature, where they were set
    seen: float = 1.0  # all arms but `unseen` train on this part of the stream

    def of(self, arm: str, run="run") -> str:
        """The run folder of an arm's stage; without `run` the arm's folder is the run folder."""
        return os.path.join(self.folder, arm, run) if run else os.path.join(self.folder, arm)

    def random(self, arm: str, n_layer: int, run="run", **flags) -> Stage:
        """A Stage that trains n_layer blocks from random init."""
        config = dataclasses.replace(self.config, n_layer=n_layer)
        shape = {key: getattr(config, key) for key in ARCHITECTURE}
        return Stage(self.of(arm, run), config, self.flags | shape | flags)

    def inherited(self, arm: str, run="run", n_layer=None, source=None, flags=None, **how) -> Stage:
        """A Stage that trains what inherit.py makes of the reference or of `source` with the flags `how`."""
        start = {"ckpt": source or self.reference, **how, "seed": self.flags["seed"]}
        config = dataclasses.replace(self.config, n_layer=n_layer or self.k)
        flags = self.flags | {"block_size": config.block_size} | (flags or {})
        run = self.of(arm, run)
        return Stage(run, config, flags, start, run + "_start")

    def first(self, arm: str, **how) -> Stage:
        """`inherited` of the first k blocks, or of what `how` makes of k blocks."""
        return self.inherited(arm, layers=self.k, **how)


def inherit_flags(start: dict) -> list[str]:
    """A Stage's start as inherit.py's command line."""
    pairs = [(f"--{key}",) if value is True else (f"--{key}", str(value)) for key, value in start.items()]
    return [part for pair in pairs for part in pair]


def reference(c, arm="reference", **flags):
    if c.reference_flags is None:
        return []
    config = dataclasses.replace(c.config, **flags)
    return [Stage(c.of(arm), config, c.reference_flags | flags, files=c.reference_files)]


def other_scale(c):
    """The setting by which the scaled arms differ: the inverse-layer scale on where it is off."""
    return {"scale_attn_by_inverse_layer_idx": not c.config.scale_attn_by_inverse_layer_idx}


def longer(c, arm):
    return [c.random(arm, c.k, max_iters=2 * c.flags["max_iters"], lr_decay_iters=None)]


def matched(c, arm):
    """Random init for as many steps as cost what reference and Inheritune cost together."""
    small = c.random(arm, c.k)
    steps = round(c.reference_flops / small.flops_per_step) + small.steps
    return [c.random(arm, c.k, max_iters=steps, lr_decay_iters=None)]


def half_width(c, arm):
    n_head = c.config.n_head // 2
    stage = c.inherited(arm, n_layer=c.config.n_layer, recipe="half_width")
    narrow = {"n_head": n_head, "n_embd": n_head * (c.config.n_embd // c.config.n_head)}
    return [dataclasses.replace(stage, config=dataclasses.replace(stage.config, **narrow))]


def stacking(c, arm):
    half = c.random(arm, c.k // 2, run="stage_1")
    source = os.path.join(half.run, "latest")
    return [half, c.inherited(arm, run="stage_2", source=source, recipe="stack", layers=c.k)]


def grown(c, arm, onto):
    """A run for each round: all blocks from the reference, or its next ones onto the trained model."""
    stages = []
    for k in c.rounds:
        how = {"onto": os.path.join(stages[-1].run, "latest")} if onto and stages else {}
        stages.append(c.inherited(arm, run=f"round_{k:02}", n_layer=k, layers=k, **how))
    return stages


def reference_scaled(c, arm):
    return reference(c, arm, **other_scale(c))


def scaled(c, arm):
    stage = c.first(arm, source=os.path.join(c.of("reference_scaled"), "latest"))
    return [dataclasses.replace(stage, config=dataclasses.replace(stage.config, **other_scale(c)))]


@dataclass(frozen=True)
class Arm:
    """How an arm is called in tables, its stages, and the arm it starts from (or learns from), if any."""

    label: str
    stages: Callable[[Common, str], list[Stage]]  # of the Common and the arm's name
    source: str | None = "reference"


def first_k(label, **how):
    """An Arm that trains what inherit.py makes of k blocks with the flags `how`."""
    return Arm(label, lambda c, a: [c.first(a, **how)])


def distilled(label, begin):
    """An Arm that trains the Stage which `begin` makes with the reference for a teacher."""

    def stages(c, arm):
        stage = begin(c, arm)
        flags = stage.flags | {"teacher": c.reference} | c.kd
        return [dataclasses.replace(stage, flags=flags, teacher=c.config)]

    return Arm(label, stages)


ARMS = {
    "reference": Arm("reference", reference, None),
    "random": Arm("random init", lambda c, a: [c.random(a, c.k)], None),
    "random_2x": Arm("random init, twice the steps", longer, None),
    "random_matched": Arm("random init, compute of reference + Inheritune", matched, None),
    "inheritune": first_k("Inheritune"),
    "released_slice": first_k("authors' released slice", released_slice=True),
    "half_width": Arm("half width", half_width),
    "stacking": Arm("stacking", stacking, None),
    "hybrid": first_k("hybrid stacking", recipe="hybrid"),
    "last": first_k("last k", recipe="last"),
    "middle": first_k("middle k", recipe="middle"),
    "alternate": first_k("every second", recipe="alternate"),
    "first_plus_last": first_k("first k-1 and the last", recipe="first_plus_last"),
    "ends": first_k("first and last half of k", recipe="ends"),
    "kd": distilled("distillation", lambda c, a: c.random(a, c.k)),
    "kd_inherit": distilled("distillation + Inheritune", lambda c, a: c.first(a)),
    "kd_ends": distilled("distillation + first and last half of k", lambda c, a: c.first(a, recipe="ends")),
    "attn": first_k("attention only", parts="attn"),
    "mlp": first_k("MLP only", parts="mlp"),
    "attn_mlp": first_k("attention + MLP, no LayerNorms", parts="attn+mlp", layernorms=False),
    "rounds": Arm("Inheritune, by rounds", lambda c, a: grown(c, a, onto=False)),
    "onto": Arm("growth onto the trained model", lambda c, a: grown(c, a, onto=True)),
    "unseen": Arm(
        "Inheritune, data unseen by reference",
        lambda c, a: [c.first(a, flags={"data_start": c.seen, "data_end": 1.0})],
    ),
    "reference_scaled": Arm("reference, other attention scale", reference_scaled, None),
    "inheritune_scaled": Arm("Inheritune, other attention scale", scaled, "reference_scaled"),
}


def split_name(name: str) -> tuple[str, dict]:
    """("ends", {"max_iters": 500}) of "ends@max_iters=500". Raises UserError."""
    base, *changes = name.split("@")
    if base not in ARMS:
        raise UserError(f"arms: there is no arm {base!r}{nearest(base, ARMS)}; they are {', '.join(ARMS)}")
    settings, given = parse((TrainSettings,), [f"--{change}" for change in changes], "")
    if fixed := sorted(given & set(FIXED)):
        raise UserError(f"arms: {name} sets {', '.join(fixed)}, which the arms decide: leave it out")
    ordered = dict.fromkeys(change.partition("=")[0].replace("-", "_") for change in changes)
    return base, {key: getattr(settings, key) for key in ordered if key in given}


@functools.cache
def find_arm(name: str) -> Arm:
    """The Arm called `name`: one of ARMS, or one with settings of its own, NAME@key=value@…

    inheritune@max_iters=500@optimizer=muon is Inheritune for 500 steps under Muon. Raises UserError.
    """
    base, changed = split_name(name)
    if not changed:
        return ARMS[base]

    # a setting of the machine changes no number, and min_lr goes with the learning rate
    told = {key: value for key, value in changed.items() if key not in MACHINE}
    if "max_iters" in changed:
        changed = {"lr_decay_iters": None} | changed  # the schedule ends with the run

    def stages(c, arm):
        reference_flags = c.reference_flags and c.reference_flags | changed
        kd = c.kd | {key: changed[key] for key in c.kd.keys() & changed}
        c = dataclasses.replace(c, flags=c.flags | changed, reference_flags=reference_flags, kd=kd)
        return ARMS[base].stages(c, arm)

    if "learning_rate" in told:
        told.pop("min_lr", None)
    label = ", ".join([ARMS[base].label, *(say(key, value) for key, value in told.items())])
    return dataclasses.replace(ARMS[base], label=label, stages=stages)


def say(key, value) -> str:
    """A changed setting as labels have it."""
    if key == "max_iters":
        return f"{value:,} steps"
    if key == "batch_tokens":
        return f"{value:,} tokens a step"
    if key == "learning_rate":
        return f"lr {value:g}"
    return OPTIMIZERS[value] if key == "optimizer" else f"{key} {value}"


def parse_arms(text: str) -> dict[str, int]:
    """{arm: number of seeds} from "all:1 random:3"; later entries replace earlier ones, and the arms that
    others start from get as many seeds as these. Variants come behind what they vary. Raises UserError."""
    seeds = {}
    for part in text.replace(",", " ").split():
        name, _, count = part.partition(":")
        if name != "all":
            find_arm(name)
        if count and not count.isdecimal():
            raise UserError(f"arms: {part!r} is not NAME:SEEDS")
        seeds |= dict.fromkeys(ARMS if name == "all" else [name], int(count or 1))
    for name in list(seeds):
        for needed in {"reference", find_arm(name).source} - {None}:
            seeds[needed] = max(seeds.get(needed, 0), seeds[name])
    order = list(ARMS)
    named = sorted(seeds, key=lambda name: (order.index(name.partition("@")[0]), "@" in name))
    return {name: seeds[name] for name in named if seeds[name]}


def impossible(c: Common) -> dict[str, str]:
    """{arm: why it cannot be made} of this Common."""
    reasons = {}
    if c.reference_flags is None:
        given = "the reference was given, not trained here"
        reasons |= dict.fromkeys(("reference_scaled", "inheritune_scaled"), given)
        reasons["unseen"] = "nobody knows which data the given reference saw"
    elif c.seen == 1:
        reasons["unseen"] = "the reference sees all data: set seen below 1"
    if c.reference_flops is None:
        reasons["random_matched"] = "the reference's training compute is unknown"
    if c.k % 2:
        reasons |= dict.fromkeys(("stacking", "hybrid"), f"{c.k} blocks are not twice a whole number")
    if c.config.n_head == 1:
        reasons["half_width"] = "it needs two heads"
    return reasons


def small_flags(settings: TrainSettings, given: frozenset) -> dict:
    """The flags of every small model: what was set for the experiment, without what each stage decides."""
    chosen = given - set(DECIDED) | {"max_iters", "batch_tokens"}
    return {key: value for key, value in dataclasses.asdict(settings).items() if key in chosen}


def plan_reference(path: str, dataset: str) -> tuple[TrainSettings, GPTConfig]:
    """Settings and GPTConfig of the reference that the train.py config `path` makes on a data folder, which
    need not be there yet. Raises UserError."""
    settings, given = parse((TrainSettings,), [path], "")
    settings = dataclasses.replace(settings, dataset=dataset, dry_run=True)
    return settings, make_plan(settings, given, world=1).config


def settings_hash(c: Common, arm: str) -> str:
    """A short hash of all that decides an arm's numbers: the settings of its stages, and of what it starts
    from. Settings at their default are left out, so that a new one changes no hash."""
    # frozen: results/*/results.csv holds these hashes, and an arm made again must get the same one
    defaults = dataclasses.asdict(TrainSettings())
    described = []
    for name in (arm, find_arm(arm).source):
        for stage in find_arm(name).stages(c, name) if name else []:
            flags = [f"--{key}={value}" for key, value in stage.flags.items()]
            settings = dataclasses.asdict(parse((TrainSettings,), [*stage.files, *flags], "")[0])
            chosen = {k: v for k, v in settings.items() if v != defaults[k] and k not in MACHINE}
            described.append([sorted(chosen.items()), inherit_flags(stage.start)])
    if find_arm(arm).source and c.reference_flags is None:
        described.append(fingerprint(c.reference))
    text = json.dumps(described).replace(c.reference, "reference").replace(c.folder, "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]
