"""What a finished arm leaves: loss curves, wall time, final losses, ranks of its attention, and its row."""

import dataclasses
import os
from collections.abc import Callable, Iterator

import torch

from inheritune.data.reader import ValData, check_tokenizer, identity
from inheritune.experiments.arms import Arm, settings_hash
from inheritune.experiments.attention_metrics import LENGTH, SEED, SEQUENCES, draw_windows, measure_layers
from inheritune.experiments.stages import ONE_AT_A_TIME, Common, Stage
from inheritune.models.open_model import Config, Model, load_model, model_class, open_config
from inheritune.training import device as machine
from inheritune.training.distributed import DistributedModel, Ranks, seed_all
from inheritune.training.logs import loss_curve, read_rows
from inheritune.training.losses import mean_loss
from inheritune.training.settings import ReplicateSettings, TrainSettings
from inheritune.weights import checkpoint


def history(stages: list[Stage]) -> Iterator[tuple[int, float, int, float]]:
    """(step, FLOPs, layer-steps, loss in nats/token) of each validation of an arm, its stages one after the
    other. All that earlier stages took counts."""
    steps, flops, layer_steps = 0, 0.0, 0
    for stage in stages:
        for row in read_rows(os.path.join(stage.run, "log.csv")):
            if row["val_loss"]:
                n, own = int(row["step"]), stage.start_flops + int(row["step"]) * stage.flops_per_step
                yield steps + n, flops + own, layer_steps + n * stage.config.n_layer, float(row["val_loss"])
        steps, flops, layer_steps = steps + stage.steps, flops + stage.flops, layer_steps + stage.layer_steps


def first_reach(stages: list[Stage], target: float) -> dict:
    """{reached_step, reached_flops, reached_layer_steps} at the first validation loss ≤ target; None where an
    arm never gets there."""
    keys = ("reached_step", "reached_flops", "reached_layer_steps")
    for *taken, loss in history(stages):
        if loss <= target:
            return dict(zip(keys, taken, strict=True))
    return dict.fromkeys(keys)


def wall_seconds(run: str) -> float:
    """Seconds that a run trained and validated. timing.csv counts from 0 again where a run was continued, so
    this adds up the last row of each process."""
    rows = read_rows(os.path.join(run, "timing.csv"))
    seconds = [float(row["train_s"]) + float(row["val_s"]) for row in rows]
    return sum(now for now, later in zip(seconds, [*seconds[1:], -1.0], strict=True) if later < now)


def cost_of_training(folder: str, config: Config) -> tuple[float | None, int | None]:
    """(FLOPs, layer-steps) of all the training in a checkpoint with this config. (None, None) where they are
    unknown: its state.json is missing, or it started from, or learned from, another model."""
    if not os.path.exists(os.path.join(folder, checkpoint.STATE)):
        return None, None
    state = checkpoint.read_state(folder)
    if state["settings"].get("init_from") != "scratch" or state["settings"].get("teacher"):
        return None, None
    return state["tokens"] * config.flops_per_token, state["step"] * config.n_layer


def validation_loss(settings: TrainSettings, config: Config, folder: str) -> float:
    """Validation loss (nats/token) of a checkpoint as train.py measures it: on the same tokens in the same
    windows, compiled or not, in the same number format. Nothing stays on the device, as the training that
    comes next is another process.

    config: its block_size is the windows' length.
    """
    check_tokenizer(settings.dataset, folder, config)
    device, ranks = machine.pick(settings.device), Ranks()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in training
    val = ValData(settings.dataset, config.block_size, settings.eval_tokens, settings.batch_size)
    dtype, module = machine.pick_dtype(settings.dtype, device), load_model(folder)
    compiled = machine.is_compiled(settings.compile, device)
    model = DistributedModel(module, ranks, device, dtype, compiled, shard=False)
    loss = mean_loss(model.local_forward, val, ranks, device, dtype)
    del model, module
    torch.cuda.empty_cache()
    return loss


def max_ranks(settings: TrainSettings, load: Callable[[], Model]) -> list[float] | None:
    """MaxRank of each layer of the model that `load` makes, on the paper's 100 windows of val, the same for
    every arm and seed; None for a model without attention matrices. Nothing stays on the device."""
    torch.set_float32_matmul_precision("highest")  # ranks hang on small probabilities; validation allows TF32
    model = load().to(machine.pick(settings.device))
    length = min(LENGTH, model.config.block_size)
    idx, _ = draw_windows(settings.dataset, "val", SEQUENCES, length, SEED)
    heads, _, _ = measure_layers(model, idx)
    del model
    torch.cuda.empty_cache()
    return heads and heads["rank_0.9"].amax(-1).tolist()


def measured_on(settings: TrainSettings, rep: ReplicateSettings, c: Common) -> dict:
    """The entries that must be equal in rows that are compared: the data, the number of tokens of the final
    loss, and the files of a reference that was given."""
    return {
        "data": identity(settings.dataset),
        "val_tokens": rep.final_tokens or settings.eval_tokens,
        "reference": None if c.reference_stage else checkpoint.fingerprint(c.reference)["files"],
    }


def make_row(
    settings: TrainSettings, rep: ReplicateSettings, c: Common, arm: Arm, target: float | None
) -> dict:
    """The content of an arm's row.json: results.csv's columns, and MaxRank by depth before and after.

    target: the loss with which the reference's curve ends; None for the reference itself.
    """
    stages = arm.stages(c)
    flops, layer_steps = c.reference_cost  # of a reference that was given
    if stages:
        flops, layer_steps = sum(s.flops for s in stages), sum(s.layer_steps for s in stages)
    with ONE_AT_A_TIME:
        measured, config = measure_arm(settings, rep, c, stages)
    before = c.reference_cost if arm.from_reference else (0, 0)
    known = None not in (flops, *before)
    lazy = [ranks and ranks.count(1) for ranks in (measured["ranks_before"], measured["ranks_after"])]
    return {
        "arm": arm.name,
        "seed": c.flags["seed"],
        **measured,
        "steps": sum(s.steps for s in stages) if stages else None,
        "flops": flops,
        "layer_steps": layer_steps,
        "wall_s": round(sum(wall_seconds(s.run) for s in stages), 1) if stages else None,
        "params": config.num_params,
        "settings_hash": settings_hash(c, arm),
        **measured_on(settings, rep, c),
        "n_layer": config.n_layer,
        "flops_with_reference": flops + before[0] if known else None,
        "layer_steps_with_reference": layer_steps + before[1] if known else None,
        **first_reach(stages, measured["curve_loss"] if target is None else target),
        "lazy_before": lazy[0],
        "lazy_after": lazy[1],
        "hardware": checkpoint.environment()["hardware"] | {"threads": torch.get_num_threads()},
    }


def measure_arm(settings, rep, c, stages) -> tuple[dict, Config]:
    """({val_loss, curve_loss, ranks_before, ranks_after}, config of the model) of an arm's stages.

    Without stages it is the given reference; nothing is known of it before its training.
    """
    if stages:
        last = stages[-1]
        folder = checkpoint.find(last.run, prefer="latest")
        config = open_config(folder)

        def untrained():
            if last.start_options:
                return load_model(last.start_folder)
            seed_all(c.flags["seed"])  # as train.py does before it makes the same model
            return model_class(config)(config)

        curve_loss, ranks_before = loss_curve(last.run)[1][-1], max_ranks(settings, untrained)
    else:
        folder, config = c.reference, c.config
        curve_loss, ranks_before = validation_loss(settings, config, folder), None
    val_loss = curve_loss
    if rep.final_tokens:
        final = dataclasses.replace(settings, eval_tokens=rep.final_tokens)
        val_loss = validation_loss(final, config, folder)
    found = {"val_loss": val_loss, "curve_loss": curve_loss, "ranks_before": ranks_before}
    return found | {"ranks_after": max_ranks(settings, lambda: load_model(folder))}, config
