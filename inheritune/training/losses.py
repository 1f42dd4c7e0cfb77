"""The loss of a model over fixed tokens: the one loop behind validation, grow.py's comparison and score.py."""

import torch
from tqdm import tqdm

from inheritune.training import device as machine


def to_device(tensor, device):
    """Move token ids to the device; to a GPU without waiting for the copy."""
    if device.type == "cuda":  # needs a GPU
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@torch.no_grad()
def total_nats(model, data, ranks, device, dtype, title=None, request=None, together=False):
    """The summed loss (nats) over all targets of `data`, the same number on every rank.

    data has `n_groups` and `batch(g)`, inputs and targets of group g (data.ValData, score.Whole). Ranks take turns with
    the groups; each group's sum has its own place, so the total does not depend on how many ranks there are. A title
    shows a progress bar on rank 0. When a stop.Request asks any rank to end, it is None on all. A sharded model must be
    called by all ranks `together`: those that have no group left compute the last one with the others, in vain. Leaves
    the model in eval mode.
    """
    model.eval()
    sums = torch.zeros(data.n_groups + 1, dtype=torch.float64)  # the last is the number of ranks asked to end
    end = -(-data.n_groups // ranks.world) * ranks.world if together else data.n_groups
    mine = range(ranks.rank, end, ranks.world)
    for g in tqdm(mine, desc=title, unit="batch", disable=title is None or not ranks.first):
        asked = torch.tensor(1.0 if request and request.signal else 0.0)
        if ranks.sum(asked, device) if together else asked:
            sums[-1] = 1
            break
        idx, targets = data.batch(min(g, data.n_groups - 1))
        # what a sharded model gathers must not be born in inference mode: it will train with that
        with machine.autocast(device, dtype), torch.inference_mode(not together):
            loss = model(to_device(idx, device), to_device(targets, device))
        if g < data.n_groups:
            sums[g] = loss.cpu().double() * targets.numel()
    nats, asked = ranks.sum(sums, device).split([data.n_groups, 1])
    return None if asked.item() else nats.sum().item()


def mean_loss(model, val, ranks, device, dtype, request=None, together=False):
    """Mean loss (nats/token) over the fixed validation tokens of `val` (a data.ValData), or None; see `total_nats`."""
    nats = total_nats(model, val, ranks, device, dtype, request=request, together=together)
    return None if nats is None else nats / (val.n_windows * val.block_size)
