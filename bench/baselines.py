"""What ours is compared with: a training step as nanoGPT-style scripts write it, and one with transformers'
GPT-2.

Eager fp32, the logits whole and cross-entropy on them, AdamW as torch chooses it on the CPU, a memory map
opened for every batch of random offsets.
"""

import math

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

BETAS, DECAY, CLIP = (0.9, 0.95), 0.1, 1.0


class PlainBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(C, 3 * C, bias=False), "c_proj": nn.Linear(C, C, bias=False)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(C, 4 * C, bias=False), "c_proj": nn.Linear(4 * C, C, bias=False)}
        )
        self.gelu = nn.GELU(approximate="tanh")

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp["c_proj"](self.gelu(self.mlp["c_fc"](self.ln_2(x))))


class PlainGPT(nn.Module):
    """A GPT without biases whose parameters have the names of model.GPT's, so that a state dict fits both."""

    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=False),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(p, std=std)

    def forward(self, idx, targets):
        pos = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](pos)
        for block in self.transformer["h"]:
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


class PlainTrainer:
    """`step(idx, targets)` trains one micro-batch (B, T) int64 each, `batch()` draws one from a bin, in a
    plain way."""

    def __init__(self, model, loss, lr=1e-3, fused=None):
        self.model, self.loss = model, loss
        decayed = [p for n, p in model.named_parameters() if p.dim() == 2 and ".h." in n]  # as ours
        rest = [p for n, p in model.named_parameters() if p.dim() != 2 or ".h." not in n]
        groups = [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=fused)

    def step(self, idx, targets):
        loss = self.loss(self.model, idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def plain(config):
    """The nanoGPT-style trainer for a GPTConfig."""
    return PlainTrainer(PlainGPT(config), lambda model, idx, targets: model(idx, targets))


def nanogpt_step(config, path, micro_batch, accumulation, device, compiled):
    """nanoGPT's step on a GPU, as a function without arguments: in 16 bits by autocast, with fused AdamW;
    the next micro-batch is copied from pinned memory while this one is computed."""
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if not on_gpu or torch.cuda.is_bf16_supported() else torch.float16
    torch.set_float32_matmul_precision("high")
    model = PlainGPT(config).to(device)
    optimizer = PlainTrainer(model, None, fused=True).optimizer
    forward = torch.compile(model) if compiled else model

    def batch():
        tensors = random_batch(path, micro_batch, config.block_size)
        if on_gpu:
            return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
        return tensors

    ahead = [batch()]

    def step():
        for _ in range(accumulation):
            with torch.autocast(device, dtype):
                loss = forward(*ahead.pop()) / accumulation
            ahead.append(batch())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def hugging_face(config):
    """The trainer with transformers' GPT2LMHeadModel for a GPTConfig."""
    import transformers

    sizes = {key: getattr(config, key) for key in ("vocab_size", "n_embd", "n_layer", "n_head")}
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    options = {"n_positions": config.block_size, "use_cache": False}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, **options))

    def loss(model, idx, targets):
        logits = model(idx).logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))

    return PlainTrainer(model.train(), loss)


def random_batch(path, batch_size, block_size):
    """Inputs and targets (batch_size, block_size) int64 at random offsets of a uint16 bin, opened anew."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - block_size, (batch_size,))
    x, y = (
        torch.stack(
            [torch.from_numpy(data[i + d : i + d + block_size].astype(np.int64)) for i in starts.tolist()]
        )
        for d in (0, 1)
    )
    return x, y
