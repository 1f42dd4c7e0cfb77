"""The optimizer and the learning-rate schedule."""

import math
import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from inheritune.base.errors import UserError
from inheritune.training.shard import like, whole

ADAMW, MUON = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)  # what each keeps for a parameter


class Both(torch.optim.Optimizer):
    """Muon for the first group of parameters and AdamW for the second, as one optimizer with one state.

    torch's Muon takes matrices only. Its update is scaled to the size of AdamW's (`match_rms_adamw`), so both groups
    share one learning rate.
    """

    def __init__(self, matrices, rest, settings, fused):
        muon = torch.optim.Muon([matrices], lr=settings.learning_rate, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(
            [rest], lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=fused
        )
        super().__init__(muon.param_groups + adamw.param_groups, {})
        self.parts = muon, adamw
        self.share()

    def share(self):
        """Let the parts work on this optimizer's groups and state."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.share()

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()


def make_optimizer(model, settings, device):
    """The optimizer of a run (paper, sec. 3: AdamW). The blocks' matrices decay, while embeddings (and with them the
    tied head), LayerNorms and biases do not. AdamW is fused into one kernel where torch has it (CPU, CUDA)."""
    decayed = [p for n, p in model.named_parameters() if p.dim() == 2 and ".h." in n]
    chosen = set(decayed)
    rest = [p for p in model.parameters() if p not in chosen]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")
    if settings.optimizer == "muon":
        return Both(*groups, settings, fused)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=fused)


def learning_rate(step, settings):
    """The rate of the update that follows `step` updates: linear warm-up from above 0 on, cosine, then min_lr."""
    peak, low, warm = settings.learning_rate, settings.min_lr, settings.warmup_iters
    end = settings.max_iters if settings.lr_decay_iters is None else settings.lr_decay_iters
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    if step >= end:
        return low
    return low + (peak - low) * (1 + math.cos(math.pi * (step - warm) / (end - warm))) / 2


def snapshot(model, optimizer, into):
    """Copy the model's parameters and the optimizer's state to the CPU, into the dict `into`, and return it:
    {"parameter name": tensor} and {"parameter name/state name": tensor}, oriented and typed as they are.

    Tensors that `into` has from an earlier call are overwritten: memory fresh from the system costs more than copying.
    Of a sharded model every rank must ask, and one tensor at a time is put together; ranks whose `into` is None only
    lend their part.
    """
    tensors = dict(model.named_parameters()) | optimizer_tensors(model, optimizer)
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())
        if into is not None and name in into:
            into[name].copy_(tensor)
        elif into is not None:
            into[name] = tensor.to("cpu", copy=True)
    return into


def optimizer_tensors(model, optimizer):
    """The optimizer's state as {"parameter name/state name": tensor}."""
    return {f"{name}/{key}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}


def load_optimizer(folder, model, optimizer):
    """Fill the optimizer of `model` from a checkpoint folder. Raises UserError when the file is missing, damaged, or
    another model's."""
    path = os.path.join(folder, "optimizer.safetensors")
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("no regular file")
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: this checkpoint can start a run (--init_from) but not continue one"
        ) from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged ({e}); delete the folder to go on from the checkpoint before it") from None
    parameters = dict(model.named_parameters())
    names = {p: name for name, p in parameters.items()}
    kept, ordered = {}, []
    for group in optimizer.param_groups:
        keys = MUON if "ns_steps" in group else ADAMW
        kept.update((f"{names[p]}/{key}", () if key == "step" else p.shape) for p in group["params"] for key in keys)
        ordered += [names[p] for p in group["params"]]
    state = {name: {} for name in ordered}
    for full, tensor in tensors.items():
        if kept.get(full) != tensor.shape or not tensor.is_floating_point():
            raise UserError(f"{path}: {full} {tuple(tensor.shape)} does not fit the model; it is another run's")
        name, _, key = full.rpartition("/")
        # a copy: the optimizer keeps what it is given, and this one is the file, mapped
        state[name][key] = like(tensor, parameters[name]) if tensor.dim() else tensor.clone()
    lacking = next((full for full in kept if tensors and full not in tensors), None)
    if lacking:
        raise UserError(f"{path} lacks {lacking}; it is damaged or another run's")
    packed = {i: state[name] for i, name in enumerate(ordered) if state[name]}
    optimizer.load_state_dict({"state": packed, "param_groups": optimizer.state_dict()["param_groups"]})
