"""Rules that choose which k blocks of a reference to keep, measured on the arms' training data.

The windows are CHOICE_WINDOWS of 100 tokens of the training split, the same for every arm and seed. The
influence of a block is 1 − cosine of its input and output, averaged over tokens (ShortGPT, arXiv 2403.03853).
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from inheritune.experiments import attention_metrics as metrics
from inheritune.models.blocks import like_output, recorded, replaced
from inheritune.models.open_model import Config

CHOICE_WINDOWS = 20
LAST_KEPT = 2  # blocks at the end that `consecutive` does not remove


def most_influence(model, idx: Tensor, targets: Tensor, k: int) -> list[int]:
    """The k blocks of the highest block influence."""
    _, influence, _ = metrics.measure_layers(model, idx, taus=())
    return metrics.choose_by_influence(influence.tolist(), k)[0]


@torch.inference_mode()
def without_consecutive(model, idx: Tensor, targets: Tensor, k: int) -> list[int]:
    """Remove the n - k consecutive blocks that change the residual stream least, and never the
    last two, unless k is 1 (arXiv 2403.17887)."""
    n = model.config.n_layer
    stream = [x for _, x in model.attention_steps(idx)]  # n + 1 of (N, T, C)
    removed = n - k
    distances = [
        (1 - F.cosine_similarity(stream[i], stream[i + removed], dim=-1)).mean().item()
        for i in range(max(1, k - LAST_KEPT + 1))
    ]
    first = distances.index(min(distances))
    return [*range(first), *range(first + removed, n)]


@torch.inference_mode()
def greedy(model, idx: Tensor, targets: Tensor, k: int) -> list[int]:
    """Remove one block at a time until k are left: each time the one without which the loss is lowest."""
    kept = list(range(model.config.n_layer))
    with recorded(model.blocks) as calls:
        model(idx[:1], targets[:1])
    _, output = calls[0]

    def skip(*args, **kwargs):
        """Return a block's input as its output."""
        return like_output(args[0] if args else kwargs["hidden_states"], output)

    for _ in tqdm(range(len(kept) - k), desc="choosing blocks", unit="block"):
        removed = [block for i, block in enumerate(model.blocks) if i not in kept]
        with replaced(removed, skip):
            _, losses = metrics.skip_losses(model, idx, targets, blocks=kept)
        del kept[losses.index(min(losses))]
    return kept


RULES: dict[str, Callable[[torch.nn.Module, Tensor, Tensor, int], list[int]]] = {
    "influence": most_influence,
    "consecutive": without_consecutive,
    "greedy": greedy,
}


def choose_kept(rule: str, folder: str, data: str, k: int) -> list[int]:
    """The k blocks of the checkpoint `folder` to keep by one of RULES, on a data folder. Raises UserError."""
    model, idx, targets = metrics.open_with_windows(folder, data, "train", CHOICE_WINDOWS)
    return RULES[rule](model.eval(), idx, targets, k)


def choice_flops(rule: str, config: Config, k: int) -> float:
    """FLOPs of choosing by a rule: a forward pass over the windows. To remove one of m blocks, `greedy` makes
    m + 1 passes: one over all of them, the others over the last m - 1, m - 2, …, 0."""
    config = dataclasses.replace(config, block_size=min(metrics.LENGTH, config.block_size))
    n = config.n_layer
    depths = [n]  # of the passes: blocks that run
    if rule == "greedy":
        depths = [depth for blocks in range(n, k, -1) for depth in (blocks, *range(blocks))]
    tokens = CHOICE_WINDOWS * config.block_size
    whole, without_one = config.flops_per_token, config.with_blocks(list(range(n - 1))).flops_per_token
    return (
        tokens * sum(whole - (n - depth) * (whole - without_one) for depth in depths) / 3
    )  # forward: a third of training
