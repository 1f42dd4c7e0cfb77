"""The loss over fixed tokens (validation, grow.py's comparison, score.py), and the loss of distillation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from inheritune.data.reader import ValData
from inheritune.training.distributed import Ranks
from inheritune.training.settings import TrainSettings
from model import GPT, pad_vocab


@torch.no_grad()
def total_nats(
    model, data, ranks: Ranks, device: torch.device, dtype: torch.dtype, title=None, stop=None, sharded=False
) -> float | None:
    """The summed loss (nats) over all targets of `data`, the same number on any number of ranks.

    data has `n_groups` and `batch(g)`, the windows of group g (ValData, score.SplitWindows); ranks take
    turns with the groups. `stop()` is asked before each turn, equally often on every rank, and must
    answer alike on all: True ends the work, and the result is None. A title shows a progress bar on rank 0.
    Leaves the model in eval mode.
    """
    model.eval()
    nats = torch.zeros(data.n_groups, dtype=torch.float64)  # of this rank's groups; the others' stay zero
    turns = range(ranks.rank, data.n_groups + ranks.rank, ranks.world)
    for g in tqdm(turns, desc=title, unit="batch", disable=title is None or not ranks.first):
        if stop is not None and stop():
            return None
        # ranks without work repeat the last group: FSDP needs the same number of forward passes everywhere
        if g < data.n_groups or sharded:
            idx, targets = to_device(data.batch(min(g, data.n_groups - 1)), device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(idx, targets)
        if g < data.n_groups:
            nats[g] = loss.cpu().double() * targets.numel()
    return ranks.sum(nats, device).sum().item()


def mean_loss(
    model, val: ValData, ranks: Ranks, device: torch.device, dtype: torch.dtype, stop=None, sharded=False
) -> float | None:
    """Mean loss (nats/token) over the fixed validation tokens of `val`, or None; see `total_nats`."""
    nats = total_nats(model, val, ranks, device, dtype, stop=stop, sharded=sharded)
    return None if nats is None else nats / (val.n_windows * val.block_size)


class Teacher:
    """A frozen GPT to distil from, in the dtype that autocast computes in; compiled where the student is."""

    def __init__(
        self, model: GPT, settings: TrainSettings, n_vocab: int, device, dtype: torch.dtype, compiled: bool
    ):
        # autocast makes 16-bit copies of these at every call; to keep the copies alone gives the same logits
        for layer in (m for m in model.modules() if isinstance(m, nn.Linear) and dtype != torch.float32):
            for name, p in layer.named_parameters():
                setattr(layer, name, nn.Parameter(p.to(dtype)))
        self.model, self.loss = model.to(device).eval().requires_grad_(False), distillation_loss
        if compiled:  # the loss too: as one kernel it holds no fp32 copies of the logits
            self.model = torch.compile(model, dynamic=False)
            self.loss = torch.compile(distillation_loss, dynamic=False)
        self.dtype, self.how = dtype, (n_vocab, settings.kd_alpha, settings.kd_temperature)

    def __call__(self, student, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, CE, KL) of the student on ids idx (B, T); see `distillation_loss`."""
        autocast = torch.autocast(idx.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with torch.no_grad(), autocast:  # a sharded student needs none
            logits = self.model(idx)
        return self.loss(student(idx), logits, targets, *self.how)


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, n_vocab: int, alpha: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ce, kl), fp32 scalars: alpha CE + (1 - alpha) T² KL(teacher ‖ student) (paper, App. D).

    logits, teacher_logits: (B, T, ≥ n_vocab); targets: (B, T) ids. CE is the mean over tokens, as in training
    without a teacher. KL is summed over the tokenizer's n_vocab ids, both sides normalised over these alone
    at the temperature, then averaged over tokens. (A mean over the vocabulary instead would divide it by
    fifty thousand; the published logs look as if theirs did.)
    """
    ce = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    student = F.log_softmax(logits[..., :n_vocab].float() / temperature, dim=-1).flatten(0, 1)
    teacher = F.log_softmax(teacher_logits[..., :n_vocab].float() / temperature, dim=-1).flatten(0, 1)
    # batchmean: the sum over ids, the mean over tokens
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return alpha * ce + (1 - alpha) * temperature**2 * kl, ce, kl


class PaddedHead(nn.Linear):
    """The head of a vocabulary such as GPT-2's 50,257, in the product of 50,304 rows that tensor cores want.

    The last columns are cut off before anything looks at them, and the weight itself stays as it is: loss,
    gradients and what is saved are those of the plain head.
    """

    def forward(self, x):
        V = self.out_features
        return F.linear(x, F.pad(self.weight, (0, 0, 0, pad_vocab(V) - V)))[..., :V]


def pad_head(model: GPT) -> None:
    """Make the model's head a PaddedHead, in place, where that makes a difference."""
    if model.config.vocab_size % 64:
        model.lm_head.__class__ = PaddedHead


def to_device(windows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) int64 on the device, of windows (B, T+1): one copy, which a GPU makes without
    anybody waiting for it, and contiguous tensors."""
    on_gpu = device.type == "cuda"
    windows = (windows.pin_memory() if on_gpu else windows).to(device, non_blocking=on_gpu)
    return windows[:, :-1].long(), windows[:, 1:].long()
