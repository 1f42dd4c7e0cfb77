"""The optimizer and the learning-rate schedule."""

import math

import torch


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
