"""The arms of the comparison: the runs of train.py that make each, and what they start from (app. D).

An arm is one way to get a small model, or a control. All arms of a seed but `unseen` see the same data in the
same order, and all are validated on the same tokens. ARMS is the list;
`find_arm("inheritune@max_iters=500")` gives an arm with settings of its own.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

from inheritune.base.errors import UserError, nearest
from inheritune.experiments.stages import STAGE_DECIDES, Common, Stage
from inheritune.training.command_line import parse
from inheritune.training.settings import MACHINE, TrainSettings
from inheritune.weights.checkpoint import fingerprint
from model import ARCHITECTURE

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}  # their names in labels
# how changed settings look in labels; any other: "dropout 0.1"
LABELS = {"max_iters": "{:,} steps", "batch_tokens": "{:,} tokens a step", "learning_rate": "lr {:g}"}
LABELS |= {"optimizer": "{}", "teacher": "distillation"}
TEACHER = "reference"  # the only teacher of a comparison: ends@teacher=reference
# settings that the arms decide; all train on the same data, to the end
ARM_DECIDES = (*STAGE_DECIDES, "teacher", "seed", "dataset", "data_start", "data_end")
ARM_DECIDES += ("stop_at_val_loss", "stop_after_worse")


@dataclass(frozen=True)
class ArmEntry:
    """A line of ARMS: what all variants of an arm have in common."""

    label: str  # in tables and legends
    stages: Callable[[Common, str], list[Stage]]  # (common, the arm's folder) → its stages
    from_reference: bool = True  # whether it starts or learns from the reference
    longer_than: str = ""  # this arm is that one, trained for more steps


# How stages are made. folder: the arm's name; run: NAME/run, where the arm has one stage.


def trained_reference(c, folder):
    if c.reference_stage is None:
        return []
    return [dataclasses.replace(c.reference_stage, run=os.path.join(c.folder, folder, "run"))]


def random_2x(c, run):
    """Random initialisation for twice the steps."""
    return c.random(run).with_flags(max_iters=2 * c.flags["max_iters"], lr_decay_iters=None)


def random_matched(c, run):
    """Random initialisation for as many steps as cost what the reference and Inheritune cost together."""
    small = c.random(run)
    steps = round(c.reference_cost[0] / small.flops_per_step) + small.steps
    return small.with_flags(max_iters=steps, lr_decay_iters=None)


def half_width(c, run):
    """All blocks of the reference with half of their heads, and the channels of these."""
    n_head = c.config.n_head // 2
    narrow = {"n_head": n_head, "n_embd": n_head * (c.config.n_embd // c.config.n_head)}
    stage = c.inherited(run, recipe="half_width")
    return dataclasses.replace(stage, config=dataclasses.replace(stage.config, **narrow))


def stacking(c, folder):
    """Train half of the blocks, then two copies of them, one on top of the other."""
    half = c.random(f"{folder}/stage_1", c.k // 2)
    source = os.path.join(half.run, "latest")
    return [half, c.inherited(f"{folder}/stage_2", ckpt=source, recipe="stack", layers=c.k)]


def growing(c, folder, onto=False):
    """A Stage for each round, which takes all blocks from the reference, or (onto) adds the next ones to the
    model just trained."""
    stages = []
    for k in c.rounds:
        more = {"onto": os.path.join(stages[-1].run, "latest")} if onto and stages else {}
        stages.append(c.inherited(f"{folder}/round_{k:02}", layers=k, **more))
    return stages


def distilled(c, stage):
    """The Stage with the reference as its teacher."""
    flags = c.kd | stage.flags | {"teacher": c.reference}
    return dataclasses.replace(stage, flags=flags, teacher=c.config)


def unseen(c, run):
    """The first k blocks, on the part of the data that the reference has not seen."""
    return c.inherited(run, layers=c.k).with_flags(data_start=c.flags["data_end"], data_end=1.0)


# How entries of ARMS are made


def one_run(label, make_stage, **facts):
    """An ArmEntry with a single Stage, which make_stage(common, run) gives."""
    return ArmEntry(label, lambda c, folder: [make_stage(c, f"{folder}/run")], **facts)


def k_blocks(label, **options):
    """An ArmEntry that trains k blocks of the reference, inherited with these options (Common.inherited)."""
    return one_run(label, lambda c, run: c.inherited(run, layers=c.k, **options))


NOTHING = {"from_reference": False}  # the arm takes nothing from the reference
LONGER = NOTHING | {"longer_than": "random"}
ARMS = {
    "reference": ArmEntry("reference", trained_reference, **NOTHING),
    "random": one_run("random init", Common.random, **NOTHING),
    "random_2x": one_run("random init, twice the steps", random_2x, **LONGER),
    "random_matched": one_run("random init, compute of reference + Inheritune", random_matched, **LONGER),
    "inheritune": k_blocks("Inheritune"),
    "released_slice": k_blocks("authors' released slice", released_slice=True),
    "half_width": one_run("half width", half_width),
    "stacking": ArmEntry("stacking", stacking, **NOTHING),
    "hybrid": k_blocks("hybrid stacking", recipe="hybrid"),
    "last": k_blocks("last k", recipe="last"),
    "middle": k_blocks("middle k", recipe="middle"),
    "alternate": k_blocks("every second", recipe="alternate"),
    "first_plus_last": k_blocks("first k-1 and the last", recipe="first_plus_last"),
    "ends": k_blocks("first and last half of k", recipe="ends"),
    "influence": k_blocks("highest block influence", choose="influence"),
    "consecutive": k_blocks("without the consecutive blocks that do least", choose="consecutive"),
    "greedy": k_blocks("greedy by loss", choose="greedy"),
    # a control: what more training does to the reference
    "whole": one_run(
        "the whole reference, trained further", lambda c, run: c.inherited(run, layers=c.config.n_layer)
    ),
    "kd": one_run("distillation", lambda c, run: distilled(c, c.random(run))),
    "kd_inherit": one_run(
        "distillation + Inheritune", lambda c, run: distilled(c, c.inherited(run, layers=c.k))
    ),
    "attn": k_blocks("attention only", parts="attn"),
    "mlp": k_blocks("MLP only", parts="mlp"),
    "attn_mlp": k_blocks("attention + MLP, no LayerNorms", parts="attn+mlp", layernorms=False),
    "rounds": ArmEntry("Inheritune, by rounds", growing),
    "onto": ArmEntry("growth onto the trained model", functools.partial(growing, onto=True)),
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
    def entry(self) -> ArmEntry:
        return ARMS[self.base]

    @property
    def from_reference(self) -> bool:
        """Whether it starts or learns from the reference."""
        return self.entry.from_reference or "teacher" in self.changes

    @property
    def label(self) -> str:
        """'Inheritune, 500 steps, Muon'. Settings of the machine change no number and are left out, as is
        min_lr beside learning_rate."""
        hidden = MACHINE | ({"min_lr"} if "learning_rate" in self.changes else set())
        told = {key: OPTIMIZERS.get(value, value) for key, value in self.changes.items() if key not in hidden}
        return ", ".join([self.entry.label, *(LABELS.get(k, f"{k} {{}}").format(v) for k, v in told.items())])

    def stages(self, c: Common) -> list[Stage]:
        """The runs of train.py that make it; none for a reference that was given."""
        changes = self.changes
        if "max_iters" in changes:
            changes = {"lr_decay_iters": None} | changes  # the schedule ends with the run
        reference_stage = c.reference_stage and c.reference_stage.with_flags(**changes)
        c = dataclasses.replace(c, flags=c.flags | changes, reference_stage=reference_stage)
        stages = self.entry.stages(c, self.name)
        return [distilled(c, s) for s in stages] if "teacher" in self.changes else stages


@functools.cache
def find_arm(name: str) -> Arm:
    """The Arm called `name`: inheritune@max_iters=500@optimizer=muon is Inheritune for 500 steps with Muon.
    Raises UserError."""
    base, *changes = name.split("@")
    if wrong := [change for change in changes if change.partition("=")[0] in ("", "help")]:
        raise UserError(f"arms: {name}: {wrong[0]!r} is no setting; write NAME@key=value")
    if base not in ARMS:
        raise UserError(f"arms: there is no arm {base!r}{nearest(base, ARMS)}; they are {', '.join(ARMS)}")
    settings, changed = parse((TrainSettings,), [f"--{change}" for change in changes], "")
    if settings.teacher not in ("", TEACHER) or (settings.teacher and base == "reference"):
        raise UserError(f"arms: {name}: teacher must be teacher={TEACHER}, and the reference has none")
    # what a model is its arm and the reference decide; all are validated on the same tokens
    if fixed := sorted(changed & {*ARM_DECIDES, *ARCHITECTURE, "eval_tokens"} - {"teacher"}):
        raise UserError(f"arms: {name} sets {', '.join(fixed)}, which the arms decide: leave it out")
    keys = dict.fromkeys(change.partition("=")[0].replace("-", "_") for change in changes)
    return Arm(name, base, {key: getattr(settings, key) for key in keys})


def parse_arms(text: str) -> dict[Arm, int]:
    """{arm: number of seeds} of a text such as "all:1 random:3", in the order of ARMS; variants follow their
    base arm. Later entries replace earlier ones, and the reference gets as many seeds as any other arm.
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
    elif "data_end" not in c.flags:
        reasons["unseen"] = "the reference sees all data: set seen below 1"
    if c.reference_cost[0] is None:
        reasons["random_matched"] = "the reference's training compute is unknown"
    if c.k % 2:
        reasons |= dict.fromkeys(("stacking", "hybrid"), f"{c.k} blocks are not twice a whole number")
    if c.config.n_head == 1:
        reasons["half_width"] = "it needs two heads"
    if not c.config.has_parts:
        reasons |= dict.fromkeys(PARTS_OF_GPT2, "of this model only whole blocks can be taken")
    return reasons


def settings_hash(c: Common, arm: Arm) -> str:
    """A short hash of all that decides an arm's numbers: the settings of its stages, and of the reference if
    it starts from that. Settings at their default are left out, so that a new setting changes no hash."""
    # frozen: results/*/results.csv holds these hashes, and an arm made again must get the same one
    defaults = dataclasses.asdict(TrainSettings(dtype="float32"))  # what auto meant on CPUs then
    content = []
    for stage in arm.stages(c) + (find_arm("reference").stages(c) if arm.from_reference else []):
        settings = dataclasses.asdict(stage.settings)
        chosen = {k: v for k, v in settings.items() if v != defaults[k] and k not in MACHINE}
        content.append([sorted(chosen.items()), stage.start_text])
    if arm.from_reference and c.reference_stage is None:
        content.append(fingerprint(c.reference))
    text = json.dumps(content, ensure_ascii=False).replace(c.reference, "reference").replace(c.folder, "")
    return hashlib.sha256(text.encode()).hexdigest()[:12]
