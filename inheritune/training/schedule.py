"""The learning rate of every step: linear warm-up, then a decay from the peak to min_lr."""

import math

from inheritune.training.settings import TrainSettings


def decay_end(settings: TrainSettings) -> int:
    """The step where the learning rate reaches min_lr."""
    return settings.max_iters if settings.lr_decay_iters is None else settings.lr_decay_iters


def decay_start(settings: TrainSettings) -> int:
    """The step where the decay begins: after warm-up, or after the stable phase of wsd."""
    if settings.schedule != "wsd":
        return settings.warmup_iters
    end = decay_end(settings)
    length = end // 5 if settings.cooldown_iters is None else settings.cooldown_iters
    return max(settings.warmup_iters, end - length)


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The learning rate of the update that follows `step` updates.

    Warm-up does not begin at 0, where a step would change nothing: `warmup_iters=3` → 1/4, 2/4 and 3/4 of the
    peak, then the peak.
    """
    peak, low, warm = settings.learning_rate, settings.min_lr, settings.warmup_iters
    start, end = decay_start(settings), decay_end(settings)
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    if step >= end:
        return low
    if step < start:
        return peak
    if settings.schedule == "cosine":
        return low + (peak - low) * (1 + math.cos(math.pi * (step - start) / (end - start))) / 2
    return low + (peak - low) * (end - step) / (end - start)
