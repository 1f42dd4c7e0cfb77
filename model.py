"""GPT-2, whole, in one file: the model, its initialisation, and sampling with a key-value cache.

Parameter names are those of Hugging Face's GPT2LMHeadModel (`transformer.h.0.attn.c_attn.weight` …), so a
checkpoint is a renaming-free copy; gpt2_format.py transposes the four matrices of each block that Hugging Face stores
input-first.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from inheritune.weights.checkpoint import find
from inheritune.weights.gpt2_format import fill, open_model, read_config

FEW = 32  # rows of input up to which a matrix product on the CPU is bound by reading the weights
LOSS_ROWS = LinearCrossEntropyOptions(batch_chunk_size=512, acc_policy="compact")  # logits of so many rows at a time


@dataclass(frozen=True)
class GPTConfig:
    """The architecture, and what of the tokenizer the model must know."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257 ids padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms; the paper trains without
    scale_attn_by_inverse_layer_idx: bool = False  # divide attention logits by (layer number + 1), counted from 0
    n_vocab: int = 50257  # ids that the tokenizer can decode; sampling draws only from these
    tokenizer: str = "gpt2"  # what tokenizer.load_tokenizer opens
    eot: int = 50256  # the end-of-text id, where sampling stops

    @classmethod
    def from_folder(cls, folder):
        """That of a checkpoint folder. Raises UserError."""
        return cls(**read_config(folder))


def pad_vocab(n_vocab):
    """The embedding rows of a model made from scratch: a multiple of 64 keeps the head's matrix fast on GPUs."""
    return (n_vocab + 63) // 64 * 64


class Linear(nn.Linear):
    """nn.Linear that reads its weights at the speed of the memory when a CPU samples.

    A few rows times a large matrix is bound by reading the matrix, for which BLAS uses one core, or both badly. As a
    batch of products with bands of the matrix it uses all cores (bench/sampling.py: 1.6 times the bandwidth).
    """

    def forward(self, x):
        rows = x.numel() // self.in_features
        if x.device.type != "cpu" or rows > FEW or torch.is_grad_enabled() or self.weight.dtype != torch.float32:
            return super().forward(x)
        bands = self.weight.view(self.n_bands(), -1, self.in_features)  # (bands, out/bands, in)
        y = torch.bmm(x.reshape(rows, -1).expand(len(bands), -1, -1), bands.mT)  # (bands, rows, out/bands)
        y = y.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def n_bands(self):
        """How many bands of equal height: at least 8 for each thread, 1 where that does not divide well."""
        wanted = 8 * torch.get_num_threads()
        return next((n for n in range(wanted, 4 * wanted) if self.out_features % n == 0), 1)


def after(cheap, linear, x):
    """linear(cheap(x)), which keeps x for the backward pass and computes cheap(x) again: that takes less time there
    than memory here. (A compiler decides such things itself.)"""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return linear(cheap(x))
    return checkpoint(lambda x: linear(cheap(x)), x, use_reentrant=False, preserve_rng_state=False)


class KVCache:
    """Keys and values of every block for the tokens read so far, allocated once for `room` tokens."""

    def __init__(self, config, B, room, device, dtype):
        shape = (config.n_layer, B, config.n_head, room, config.n_embd // config.n_head)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # (n_layer, B, nh, room, hs)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens read; the model moves it on after its last block

    def append(self, layer, k, v):
        """Store k, v (B, nh, T, hs) of one block behind what is there; return all of its (B, nh, length+T, hs)."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.layer = layer
        hs = config.n_embd // config.n_head
        self.scale = 1 / math.sqrt(hs) / (layer + 1 if config.scale_attn_by_inverse_layer_idx else 1)

    def heads(self, x, norm):
        """Queries, keys and values of norm(x) for x (B, T, C), each (B, nh, T, hs)."""
        B, T, C = x.size()
        qkv = after(norm, self.c_attn, x).view(B, T, 3, self.n_head, C // self.n_head)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def probabilities(self, x, norm):
        """Attention matrices (B, nh, T, T) for norm(x), x (B, T, C): what `forward` multiplies v by, without ever
        holding it. For looking at (analyze.py): no cache, no dropout."""
        q, k, _ = self.heads(x, norm)
        future = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).triu(1)
        return (q @ k.mT * self.scale).masked_fill(future, -math.inf).softmax(dim=-1)

    def forward(self, x, norm, cache=None):
        """What attention to norm(x) adds to the residual stream x (B, T, C)."""
        B, T, C = x.size()
        q, k, v = self.heads(x, norm)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # With a cache, T > 1 happens only when it was empty, and a single query may look at every key.
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=T > 1, scale=self.scale
        )  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, norm):
        """What the MLP of norm(x) adds to the residual stream x (B, T, C)."""
        return self.dropout(after(self.gelu, self.c_proj, after(norm, self.c_fc, x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(x, self.ln_1, cache)
        return x + self.mlp(x, self.ln_2)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # keep only each block's input for backward, and compute the rest again
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        self.init_weights()

    def init_weights(self):
        """GPT-2's: N(0, 0.02), and 1/sqrt(2 n_layer) of that where a block adds to the residual stream."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 1:  # LayerNorm weights
                nn.init.ones_(p)
            else:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """The fp32 model of a Hugging Face GPT-2 id or folder, or of one of our checkpoints.

        Raises UserError when it cannot be fetched or is not a GPT-2 that this file implements.
        """
        folder = find(name_or_folder)
        weights, config = open_model(folder)
        model = cls(GPTConfig(**config))
        fill(dict(model.named_parameters()), weights, folder)
        return model

    def embed(self, idx, start=0):
        """The residual stream (B, T, C) that enters block 0, of ids idx (B, T) at positions from `start` on."""
        pos = torch.arange(start, start + idx.size(1), device=idx.device)
        return self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))

    def hidden(self, idx, cache=None):
        """Final hidden states (B, T, C) of token ids idx (B, T); with a cache, of what follows the ids read so far.

        Raises ValueError when the context would outgrow block_size.
        """
        start = 0 if cache is None else cache.length
        T = idx.size(1)
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit block_size {self.config.block_size}")
        x = self.embed(idx, start)
        for block in self.transformer.h:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Logits (B, T, vocab_size) of ids idx (B, T); with targets (B, T) instead the mean loss, an fp32 scalar.

        In fp32 the loss and its gradient are computed for some rows of logits at a time, which are never there all at
        once. torch's function for that rounds the loss to 16 bits under autocast, and breaks a compiled graph.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)
        if x.dtype == torch.float32 and not (torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()):
            weight = self.lm_head.weight
            return F.linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), options=LOSS_ROWS)
        return F.cross_entropy(self.lm_head(x).flatten(0, 1).float(), targets.flatten())

    def num_params(self):
        """All parameters; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def estimate_flops(self):
        """FLOPs of one training token (forward and backward): 6 per matmul parameter, 12 L C T for attention.

        Linear layers are found by type, so the head counts and the embedding look-ups do not.
        """
        matmul = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        c = self.config
        return 6 * matmul + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, cached=True):
        """Continue each row of ids idx (B, T), T ≥ 1, and yield the next ids (B,) one step at a time.

        The ids are on the CPU, and so is `generator`. temperature 0 takes the likeliest id; top_k and top_p (0 < p ≤ 1)
        narrow the choice. A row that has reached end-of-text yields that id from then on, and generation ends when
        every row has. When block_size is full the last block_size/2 tokens are read again: learned positions leave no
        way to slide the cache. `cached=False` recomputes the whole context for every token, and yields the same ids.
        """
        config = self.config
        done = torch.zeros(idx.size(0), dtype=torch.bool)
        idx = idx[:, -config.block_size :]  # the context the next token sees, never longer than block_size
        cache = None
        for _ in range(max_new_tokens):
            if idx.size(1) > config.block_size:
                idx, cache = idx[:, -max(1, config.block_size // 2) :], None
            if cached and cache is not None:
                x = self.hidden(idx[:, -1:], cache)
            else:
                wte = self.transformer.wte.weight
                room = min(config.block_size, idx.size(1) + max_new_tokens)
                cache = KVCache(config, idx.size(0), room, wte.device, wte.dtype) if cached else None
                x = self.hidden(idx, cache)
            logits = self.lm_head(x[:, -1]).float()[:, : config.n_vocab]  # (B, n_vocab)
            token = next_token(logits, temperature, top_k, top_p, generator)
            token = torch.where(done, config.eot, token)
            done |= token == config.eot
            idx = torch.cat((idx, token[:, None].to(idx.device)), dim=1)
            yield token
            if done.all():
                return


def next_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one id per row of logits (B, V), returned as (B,) int64 on the CPU. temperature 0 is argmax.

    The draw is made on the CPU: the same on every device, and Apple GPUs have no float64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1).cpu()
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, ids = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # mass of the likelier ids: the likeliest always stays
        probs = torch.zeros_like(probs).scatter(-1, ids, ordered.masked_fill(before >= top_p, 0.0))
    below = probs.cpu().double().cumsum(dim=-1)  # torch.multinomial would draw a random number for each id
    point = torch.rand(len(probs), 1, generator=generator).double() * below[:, -1:]
    return torch.searchsorted(below, point, right=True)[:, 0]  # right: never an id of probability 0
