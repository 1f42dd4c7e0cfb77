"""The arms of the comparison: for each, the runs of train.py that make it, and what they start from (paper, App. D).

An arm is one way to get a small model, or a control. All arms of a seed see the same data in the same order and are
validated on the same tokens. replicate.py trains them, compare.py sets them side by side.
"""

import dataclasses
import functools
import os
from dataclasses import dataclass

from inheritune.base.errors import UserError, nearest
from inheritune.training.parsing import parse
from inheritune.training.planning import ARCHITECTURE, costs
from inheritune.training.settings import TrainSettings
from model import GPTConfig


@dataclass(frozen=True)
class Stage:
    """One run of train.py: from random init, or from a model that inherit.py makes first."""

    run: str  # run folder
    config: GPTConfig  # of the model it trains
    flags: dict  # train.py's, all but out_dir and resume
    start: tuple = ()  # inherit.py's flags, all but --out; none: random init
    files: tuple = ()  # train.py's config file, at most one
    teacher: GPTConfig | None = None

    @property
    def start_folder(self):
        return self.run + "_start"

    @property
    def steps(self):
        return self.flags["max_iters"]

    @property
    def flops_per_step(self):
        """Of student and, forward only, teacher: a third of what training on the same tokens would cost it."""
        per_token = costs(self.config)[1] + (costs(self.teacher)[1] / 3 if self.teacher else 0)
        return per_token * self.flags["batch_tokens"]

    @property
    def layer_steps(self):
        return self.steps * self.config.n_layer


@dataclass(frozen=True)
class Bench:
    """What all arms of one seed share."""

    folder: str  # every arm has a folder of its own in it
    flags: dict  # train.py's for every small model; max_iters, batch_tokens and seed are always among them
    k: int  # blocks of the small models
    rounds: tuple  # depths of the arms that grow, the last one k
    kd: dict  # kd_alpha and kd_temperature, where they were set
    seen: float  # all arms but `unseen` train on this part of the stream
    config: GPTConfig  # of the reference
    reference: str  # its checkpoint, also when it is yet to be trained
    reference_flags: dict | None  # that train it; None for a reference that was given
    reference_files: tuple = ()
    reference_flops: float | None = None  # of its own training; None when nobody knows
    reference_layer_steps: int | None = None

    def of(self, arm, run="run"):
        """The run folder of an arm's stage."""
        return os.path.join(self.folder, arm, run)

    def random(self, arm, n_layer, run="run", **flags):
        """A Stage that trains n_layer blocks from random init."""
        config = dataclasses.replace(self.config, n_layer=n_layer)
        shape = {key: getattr(config, key) for key in (*ARCHITECTURE, "block_size")}
        return Stage(self.of(arm, run), config, self.flags | shape | flags)

    def inherited(self, arm, *how, run="run", n_layer=None, source=None, **flags):
        """A Stage that trains what inherit.py makes of the reference, or of another checkpoint."""
        start = ("--ckpt", source or self.reference, *how, "--seed", str(self.flags["seed"]))
        config = dataclasses.replace(self.config, n_layer=n_layer or self.k)
        flags = self.flags | {"block_size": config.block_size} | flags
        return Stage(self.of(arm, run), config, flags, start)

    def first(self, arm, *how, **flags):
        """A Stage that trains the first k blocks, or what `how` makes of k blocks."""
        return self.inherited(arm, "--layers", str(self.k), *how, **flags)


def reference(b, arm="reference", **flags):
    if b.reference_flags is None:
        return []
    run = b.of(arm)
    return [Stage(run, dataclasses.replace(b.config, **flags), b.reference_flags | flags, files=b.reference_files)]


def other_scale(b):
    """The setting by which the scaled arms differ from the rest: the inverse-layer scale on where it is off."""
    return {"scale_attn_by_inverse_layer_idx": not b.config.scale_attn_by_inverse_layer_idx}


def longer(b, arm, steps):
    return [b.random(arm, b.k, max_iters=steps, lr_decay_iters=None)]


def matched_steps(b):
    """Steps of the small model from random init that cost what reference and Inheritune cost together."""
    small = b.random("", b.k)
    return round(b.reference_flops / small.flops_per_step) + small.steps


def half_width(b, arm):
    n_head = b.config.n_head // 2
    stage = b.inherited(arm, "--recipe", "half_width", n_layer=b.config.n_layer)
    narrow = {"n_head": n_head, "n_embd": n_head * (b.config.n_embd // b.config.n_head)}
    return [dataclasses.replace(stage, config=dataclasses.replace(stage.config, **narrow))]


def stacking(b, arm):
    half = b.random(arm, b.k // 2, run="stage_1")
    source = os.path.join(half.run, "latest")
    return [half, b.inherited(arm, "--recipe", "stack", "--layers", str(b.k), run="stage_2", source=source)]


def distilled(b, stage):
    """The same stage with the reference for a teacher."""
    flags = stage.flags | {"teacher": b.reference} | b.kd
    return [dataclasses.replace(stage, flags=flags, teacher=b.config)]


def grown(b, arm, onto):
    """A run for each round: all blocks from the reference again, or its next ones onto the model just trained."""
    stages = []
    for k in b.rounds:
        how = ["--layers", str(k)]
        if onto and stages:
            how += ["--onto", os.path.join(stages[-1].run, "latest")]
        stages.append(b.inherited(arm, *how, run=f"round_{k:02}", n_layer=k))
    return stages


def scaled(b, arm):
    stage = b.first(arm, source=os.path.join(b.of("reference_scaled"), "latest"))
    return [dataclasses.replace(stage, config=dataclasses.replace(stage.config, **other_scale(b)))]


@dataclass(frozen=True)
class Arm:
    """How an arm is called in tables, its stages, and the arm it starts from (or learns from), if any."""

    label: str
    stages: object  # a function of (Bench, name of the arm)
    source: str | None = "reference"


ARMS = {
    "reference": Arm("reference", reference, None),
    "random": Arm("random init", lambda b, a: [b.random(a, b.k)], None),
    "random_2x": Arm("random init, twice the steps", lambda b, a: longer(b, a, 2 * b.flags["max_iters"]), None),
    "random_matched": Arm(
        "random init, compute of reference + Inheritune", lambda b, a: longer(b, a, matched_steps(b)), None
    ),
    "inheritune": Arm("Inheritune", lambda b, a: [b.first(a)]),
    "released_slice": Arm("authors' released slice", lambda b, a: [b.first(a, "--released_slice")]),
    "half_width": Arm("half width", half_width),
    "stacking": Arm("stacking", stacking, None),
    "hybrid": Arm("hybrid stacking", lambda b, a: [b.first(a, "--recipe", "hybrid")]),
    "last": Arm("last k", lambda b, a: [b.first(a, "--recipe", "last")]),
    "middle": Arm("middle k", lambda b, a: [b.first(a, "--recipe", "middle")]),
    "alternate": Arm("every second", lambda b, a: [b.first(a, "--recipe", "alternate")]),
    "first_plus_last": Arm("first k-1 and the last", lambda b, a: [b.first(a, "--recipe", "first_plus_last")]),
    "ends": Arm("first and last half of k", lambda b, a: [b.first(a, "--recipe", "ends")]),
    "kd": Arm("distillation", lambda b, a: distilled(b, b.random(a, b.k))),
    "kd_inherit": Arm("distillation + Inheritune", lambda b, a: distilled(b, b.first(a))),
    "kd_ends": Arm(
        "distillation + first and last half of k", lambda b, a: distilled(b, b.first(a, "--recipe", "ends"))
    ),
    "attn": Arm("attention only", lambda b, a: [b.first(a, "--parts", "attn")]),
    "mlp": Arm("MLP only", lambda b, a: [b.first(a, "--parts", "mlp")]),
    "attn_mlp": Arm(
        "attention + MLP, no LayerNorms", lambda b, a: [b.first(a, "--parts", "attn+mlp", "--layernorms", "False")]
    ),
    "rounds": Arm("Inheritune, by rounds", lambda b, a: grown(b, a, onto=False)),
    "onto": Arm("growth onto the trained model", lambda b, a: grown(b, a, onto=True)),
    "unseen": Arm("Inheritune, data unseen by reference", lambda b, a: [b.first(a, data_start=b.seen, data_end=1.0)]),
    "reference_scaled": Arm("reference, other attention scale", lambda b, a: reference(b, a, **other_scale(b)), None),
    "inheritune_scaled": Arm("Inheritune, other attention scale", scaled, "reference_scaled"),
}


@functools.cache
def find_arm(name):
    """The Arm called `name`: one of ARMS, or one with settings of its own, NAME@key=value@…

    inheritune@max_iters=500@optimizer=muon is Inheritune for 500 steps under Muon. Raises UserError.
    """
    base, *changes = name.split("@")
    if base not in ARMS:
        raise UserError(f"arms: there is no arm {base!r}{nearest(base, ARMS)}; they are {', '.join(ARMS)}")
    if not changes:
        return ARMS[base]
    settings, given = parse((TrainSettings,), [f"--{change}" for change in changes], "")
    changed = {key: getattr(settings, key) for key in sorted(given)}

    def stages(b, arm):
        reference_flags = b.reference_flags and b.reference_flags | changed
        kd = b.kd | {key: changed[key] for key in b.kd.keys() & changed}
        return ARMS[base].stages(
            dataclasses.replace(b, flags=b.flags | changed, reference_flags=reference_flags, kd=kd), arm
        )

    return dataclasses.replace(
        ARMS[base], label=f"{ARMS[base].label}, {', '.join(c.replace('=', ' ') for c in changes)}", stages=stages
    )


def impossible(b):
    """{arm: why it cannot be made} on this Bench."""
    reasons = {}
    if b.reference_flags is None:
        reasons |= dict.fromkeys(("reference_scaled", "inheritune_scaled"), "the reference was given, not trained here")
        reasons["unseen"] = "nobody knows which data the given reference saw"
    elif b.seen == 1:
        reasons["unseen"] = "the reference sees all data: set seen below 1"
    if b.reference_flops is None:
        reasons["random_matched"] = "the reference's training compute is unknown"
    if b.k % 2:
        reasons |= dict.fromkeys(("stacking", "hybrid"), f"{b.k} blocks are not twice a whole number")
    if b.config.n_head == 1:
        reasons["half_width"] = "it needs two heads"
    return reasons


def parse_arms(text):
    """{arm: number of seeds} from "all:1 random:3"; later entries replace earlier ones, and the arms that others start
    from get as many seeds as these. Raises UserError."""
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
    named = sorted(seeds, key=lambda name: order.index(name.partition("@")[0]))  # variants behind what they vary
    return {name: seeds[name] for name in named if seeds[name]}
