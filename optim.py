"""The optimizer and the learning-rate schedule."""

import math

import torch


def make_optimizer(model, settings, device):
    """AdamW over the model's parameters (paper, sec. 3): the blocks' matrices decay, while embeddings (and with them
    the tied head), LayerNorms and biases do not. Fused into one kernel where torch has it (CPU, CUDA)."""
    decayed = [p for n, p in model.named_parameters() if p.dim() == 2 and ".h." in n]
    chosen = set(decayed)
    rest = [p for p in model.parameters() if p not in chosen]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        fused=device.type in ("cpu", "cuda"),
    )


def learning_rate(step, settings):
    """The rate of the update that follows `step` updates: linear warm-up from above 0 on, cosine, then min_lr."""
    peak, low, warm = settings.learning_rate, settings.min_lr, settings.warmup_iters
    end = settings.max_iters if settings.lr_decay_iters is None else settings.lr_decay_iters
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    if step >= end:
        return low
    return low + (peak - low) * (1 + math.cos(math.pi * (step - warm) / (end - warm))) / 2
