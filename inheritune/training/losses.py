"""The loss over fixed tokens (validation, grow.py's comparison, score.py), and the loss of distillation."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from inheritune.data.reader import ValData
from inheritune.models.open_model import Model
from inheritune.training.device import autocast
from inheritune.training.distributed import Ranks
from inheritune.training.settings import TrainSettings
from model import pad_vocab


@torch.no_grad()
def mean_loss(
    model, data: ValData, ranks: Ranks, device: torch.device, dtype: torch.dtype, stop=None, title=None
) -> float | None:
    """Mean loss (nats/token) over all targets of `data`, the same number on any number of ranks.

    model: a GPT, or what wraps one; left in eval mode
    dtype: what autocast computes in
    stop: asked before each group. It must answer alike on all ranks; True ends the work, the result is None.
    title: of a progress bar on rank 0; None shows none
    """
    model.eval()
    nats = torch.zeros(data.n_groups, dtype=torch.float64)  # of this rank's groups; zero for those of others
    losses, sizes = [], []  # the losses stay on the device until the end: reading one would wait for the GPU
    turns = range(ranks.rank, data.n_groups + ranks.rank, ranks.world)
    for g in tqdm(turns, desc=title, unit="batch", disable=title is None or not ranks.is_first):
        if stop is not None and stop():
            return None
        # In the last turn some ranks have no group left. They run the last one once more, because FSDP needs
        # the same number of forward passes on every rank.
        idx, targets = to_device(data.batch(min(g, data.n_groups - 1)), device)
        with autocast(device, dtype):
            loss = model(idx, targets)
        losses.append(loss)
        sizes.append(targets.numel())
    summed = torch.stack(losses).cpu().double() * torch.tensor(sizes)
    n_own = len(range(ranks.rank, data.n_groups, ranks.world))
    nats[ranks.rank :: ranks.world] = summed[:n_own]  # a group that was run twice counts once
    return ranks.sum(nats, device).sum().item() / data.n_targets


class Teacher:
    """A frozen model to distil from, in the dtype that autocast computes in; compiled if the student is."""

    def __init__(
        self, model: Model, settings: TrainSettings, n_vocab: int, device, dtype: torch.dtype, compiled: bool
    ):
        # Autocast would copy these weights to 16 bits in every call. To do it once gives the same logits.
        for layer in (m for m in model.modules() if isinstance(m, nn.Linear) and dtype != torch.float32):
            for name, p in layer.named_parameters():
                setattr(layer, name, nn.Parameter(p.to(dtype)))
        self.model, self.dtype = model.to(device).eval().requires_grad_(False), dtype
        options = {"n_vocab": n_vocab, "alpha": settings.kd_alpha, "temperature": settings.kd_temperature}
        self.loss = functools.partial(distillation_loss, **options)
        if compiled:  # the loss too: as one kernel it holds no fp32 copies of the logits
            self.model = torch.compile(model, dynamic=False)
            self.loss = torch.compile(self.loss, dynamic=False)

    @torch.no_grad()
    def logits(self, idx: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of ids idx (B, T)."""
        # an autocast of its own: a sharded student runs without
        with autocast(idx.device, self.dtype):
            return self.model(idx)


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, n_vocab: int, alpha: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kl), fp32 scalars: alpha CE + (1 - alpha) T² KL(teacher ‖ student) (paper, App. D).

    logits, teacher_logits: (B, T, ≥ n_vocab); targets: (B, T) ids. CE is the mean over tokens, as in training
    without a teacher. KL is summed over the tokenizer's n_vocab ids (both sides are normalised over these
    alone, at the temperature) and averaged over tokens. A mean over the vocabulary would make it fifty
    thousand times smaller; the authors' logs look as if they took that mean.
    """
    ce = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    student = F.log_softmax(logits[..., :n_vocab].float() / temperature, dim=-1).flatten(0, 1)
    teacher = F.log_softmax(teacher_logits[..., :n_vocab].float() / temperature, dim=-1).flatten(0, 1)
    # "batchmean" is the sum over ids and the mean over tokens
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return alpha * ce + (1 - alpha) * temperature**2 * kl, ce, kl


class PaddedHead(nn.Linear):
    """A head of 50,257 rows that multiplies as one of 50,304, because tensor cores want multiples of 64.

    The added columns of the logits are cut off at once, and the weight keeps its shape. So loss, gradients
    and checkpoints are those of the plain head.
    """

    def forward(self, x):
        V = self.out_features
        return F.linear(x, F.pad(self.weight, (0, 0, 0, pad_vocab(V) - V)))[..., :V]


def pad_head(model: Model, device: torch.device, compiled: bool) -> None:
    """Make the model's head a PaddedHead, in place, where that makes it faster: compiled, or on a GPU."""
    plain = type(model.head) is nn.Linear and model.head.bias is None
    if plain and model.head.out_features % 64 and (compiled or device.type == "cuda"):
        model.head.__class__ = PaddedHead


def to_device(windows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) int64 on the device, of windows (B, T+1) on the CPU.

    The windows are copied to the device as one pinned tensor, which a GPU does in the background, and cut
    there. Copying two slices would make the CPU wait, because they are not contiguous.
    """
    on_gpu = device.type == "cuda"
    windows = (windows.pin_memory() if on_gpu else windows).to(device, non_blocking=on_gpu)
    return windows[:, :-1].long(), windows[:, 1:].long()
