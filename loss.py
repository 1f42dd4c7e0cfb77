"""The loss of a model over fixed tokens: the one loop behind validation, grow.py's comparison and score.py."""

import torch
from tqdm import tqdm

import device as machine


def to_device(tensor, device):
    """Move token ids to the device; to a GPU without waiting for the copy."""
    if device.type == "cuda":  # needs a GPU
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@torch.inference_mode()
def total_nats(model, data, ranks, device, dtype, title=None, request=None):
    """The summed loss (nats) over all targets of `data`, the same number on every rank.

    data has `n_groups` and `batch(g)`, inputs and targets of group g (data.ValData, score.Whole). Ranks take turns with
    the groups; each group's sum has its own place, so the total does not depend on how many ranks there are. A title
    shows a progress bar on rank 0. When a stop.Request asks any rank to end, it is None on all. Leaves the model in
    eval mode.
    """
    model.eval()
    sums = torch.zeros(data.n_groups + 1, dtype=torch.float64)  # the last is the number of ranks asked to end
    mine = range(ranks.rank, data.n_groups, ranks.world)
    for g in tqdm(mine, desc=title, unit="batch", disable=title is None or not ranks.first):
        if request and request.signal:
            sums[-1] = 1
            break
        idx, targets = data.batch(g)
        with machine.autocast(device, dtype):
            loss = model(to_device(idx, device), to_device(targets, device))
        sums[g] = loss.double().cpu() * targets.numel()
    nats, asked = ranks.sum(sums, device).split([data.n_groups, 1])
    return None if asked.item() else nats.sum().item()


def mean_loss(model, val, ranks, device, dtype, request=None):
    """Mean loss (nats/token) over the fixed validation tokens of `val` (a data.ValData), or None; see `total_nats`."""
    nats = total_nats(model, val, ranks, device, dtype, request=request)
    return None if nats is None else nats / (val.n_windows * val.block_size)
