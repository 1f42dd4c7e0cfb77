"""The optimizer and the learning-rate schedule, and how the optimizer's state is saved and loaded."""

import math
import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from inheritune.base.errors import UserError
from inheritune.training.distributed import distribute, gather
from inheritune.training.settings import TrainSettings
from model import GPT

# frozen: what a checkpoint keeps for each parameter, under "parameter name/state name"
ADAMW, MUON = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)


def make_optimizer(model: GPT, settings: TrainSettings, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (paper, sec. 3), or Muon for the blocks' matrices and AdamW for the rest.

    The blocks' matrices decay; embeddings (and with them the tied head), LayerNorms and biases do not.
    """
    parts = {True: [], False: []}  # a block's matrix or not: parameters
    for name, p in model.named_parameters():
        parts[p.dim() == 2 and ".h." in name].append(p)
    groups = [
        {"params": parts[True], "weight_decay": settings.weight_decay},
        {"params": parts[False], "weight_decay": 0.0},
    ]
    how = {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2)}
    how["fused"] = device.type in ("cpu", "cuda")  # one kernel, where torch has it
    return MuonAndAdamW(*groups, how) if settings.optimizer == "muon" else torch.optim.AdamW(groups, **how)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the first group of parameters and AdamW for the second, as one optimizer with one state.

    torch's Muon takes matrices only. Its update is scaled to the size of AdamW's (`match_rms_adamw`), so both
    groups share one learning rate.
    """

    def __init__(self, matrices: dict, rest: dict, how: dict):
        muon = torch.optim.Muon([matrices], lr=how["lr"], adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW([rest], **how)
        super().__init__(muon.param_groups + adamw.param_groups, {})
        self.parts = muon, adamw
        self.share()

    def share(self):
        """Make the parts work on this optimizer's groups and state."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.share()  # loading has replaced both

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The rate of the update after `step` updates: linear warm-up (not from 0), cosine, then min_lr."""
    peak, low, warm = settings.learning_rate, settings.min_lr, settings.warmup_iters
    end = settings.max_iters if settings.lr_decay_iters is None else settings.lr_decay_iters
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    if step >= end:
        return low
    return low + (peak - low) * (1 + math.cos(math.pi * (step - warm) / (end - warm))) / 2


def snapshot(
    model: GPT, optimizer: torch.optim.Optimizer, into: dict | None
) -> dict[str, torch.Tensor] | None:
    """Copy parameters {"name": tensor} and optimizer state {"name/state name": tensor} to the CPU, to `into`.

    Reuses the tensors in `into` (allocating is slower than copying), which are pinned for a GPU. With FSDP
    every rank must call, and tensors are gathered one at a time; a rank whose `into` is None keeps nothing.
    """
    tensors = dict(model.named_parameters()) | optimizer_tensors(model, optimizer)
    for name, tensor in tensors.items():
        tensor = gather(tensor.detach())
        if into is None:
            continue
        if name not in into:
            into[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        into[name].copy_(tensor, non_blocking=tensor.is_cuda)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # needs a GPU
    return into


def optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as {"parameter name/state name": tensor}."""
    named = model.named_parameters()
    return {f"{name}/{key}": value for name, p in named for key, value in optimizer.state[p].items()}


def load_optimizer(folder: str, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer of `model` from a checkpoint folder, whose file may hold no state at all.

    Raises UserError when the file is missing, damaged, or another model's.
    """
    path = os.path.join(folder, "optimizer.safetensors")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise UserError(
            f"{path} is missing or damaged ({e}); delete the folder to go on from the one before"
        ) from None

    names, packed = {p: name for name, p in model.named_parameters()}, {}
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for i, (p, group) in enumerate(parameters if tensors else ()):
        packed[i] = {}
        for key in MUON if "ns_steps" in group else ADAMW:
            name = f"{names[p]}/{key}"
            tensor, shape = tensors.pop(name, None), () if key == "step" else p.shape
            if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
                raise UserError(f"{path}: {name} is missing or does not fit the model; it is another run's")
            # a copy, because the optimizer keeps what it is given, and this is the mapped file
            packed[i][key] = distribute(tensor, p) if tensor.dim() else tensor.clone()
    if tensors:
        raise UserError(f"{path}: {next(iter(tensors))} does not fit the model; it is another run's")
    optimizer.load_state_dict({"state": packed, "param_groups": optimizer.state_dict()["param_groups"]})
