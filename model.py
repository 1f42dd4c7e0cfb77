"""GPT-2 in one file: the model, its initialisation, its loss, and sampling with a key-value cache.

It follows nanoGPT's model.py, and a comment gives the reason wherever it computes something else. The
optimizer lives in inheritune/training, the checks of a config.json in inheritune/weights/gpt2_format.py.
Parameters have the names that Hugging Face gives them (`transformer.h.0.attn.c_attn.weight` …): checkpoints
need no renaming.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from inheritune.base.errors import UserError
from inheritune.weights import gpt2_format
from inheritune.weights.checkpoint import find
from inheritune.weights.tensors import copy_rows

LOSS_ROWS = 512  # rows of logits that are in memory at once in the chunked fp32 loss
CHUNKED_LOSS = hasattr(nn, "LinearCrossEntropyOptions")  # False (torch before 2.13): all rows at once
# attention kernels of sampling on GPUs: torch would take cuDNN's on Hopper, which plans anew for every length
SAMPLING_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
GREEDY = 1e-6  # a temperature below this takes the likeliest id, as logits divided by it could overflow


@dataclass(frozen=True)
class GPTConfig:
    """The architecture, and what the model must know of its tokenizer."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257 ids padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms; the paper trains without
    scale_attn_by_inverse_layer_idx: bool = False  # divide attention logits by layer + 1, the first being 0
    n_vocab: int = 50257  # ids that the tokenizer can decode; sampling draws from these alone
    tokenizer: str = "gpt2"  # load_tokenizer (inheritune/data/tokenizer.py) opens it; "": none is named
    eot: int = 50256  # the end-of-text id, at which sampling stops

    @classmethod
    def from_folder(cls, folder: str) -> "GPTConfig":
        """The config of a checkpoint folder. Raises UserError."""
        return cls(**gpt2_format.read_config(folder))

    # What follows is asked of every model: see inheritune/models/open_model.py.
    warning = ""  # what a reader of config.json must know
    recompute_choices = ("none", "cheap", "full")  # the values of checkpoint_activations
    has_parts = True  # recipes know attention, MLP, LayerNorms and heads by their names
    block_prefix = "transformer.h."  # parameters of block 3 begin with "transformer.h.3."

    @property
    def limit(self) -> int:
        """The most tokens that the model can read at once."""
        return self.block_size

    @property
    def num_params(self) -> int:
        """All parameters; the tied embedding counts once."""
        C = self.n_embd
        embeddings = (self.vocab_size + self.block_size) * C
        ln_f = (1 + self.bias) * C
        return embeddings + self.n_layer * self.block_params + ln_f

    @property
    def block_params(self) -> int:
        """Parameters of one transformer block."""
        C = self.n_embd
        matrices = (3 + 1 + 4 + 4) * C * C  # attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj
        biases = (3 + 1 + 4 + 1) * C + 2 * C  # of the matrices and of the LayerNorms
        return matrices + 2 * C + (biases if self.bias else 0)

    @property
    def flops_per_token(self) -> int:
        """FLOPs of training per token, forward and backward: 6 per parameter of a matrix product (the head
        counts, embedding look-ups do not), and 12 L C T for attention (PaLM, appendix B)."""
        C, T, L = self.n_embd, self.block_size, self.n_layer
        return 6 * (self.vocab_size * C + L * 12 * C * C) + 12 * L * C * T

    @property
    def scratch_settings(self) -> dict:
        """train.py's settings that make a new model of this architecture."""
        return {key: getattr(self, key) for key in ARCHITECTURE}

    def with_blocks(self, blocks: list[int]) -> "GPTConfig":
        """The config of a model that has these blocks of this one."""
        return replace(self, n_layer=len(blocks))

    def content(self, dtype: torch.dtype = torch.float32) -> dict:
        """The content of config.json in a folder whose tensors have this dtype."""
        return gpt2_format.config_json(asdict(self)) | {"torch_dtype": str(dtype).removeprefix("torch.")}

    def full_content(self) -> dict:
        """`content` leaves nothing out."""
        return self.content()

    def arrange(self, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A model's parameters as its folder stores them: fp32 on the CPU, in Hugging Face's layout."""
        return gpt2_format.arrange(parameters, asdict(self))


# ARCHITECTURE: train.py's settings that describe a GPT-2.
TOKENIZER_FIELDS = ("vocab_size", "n_vocab", "tokenizer", "eot")
ARCHITECTURE = [f.name for f in fields(GPTConfig) if f.name not in ("dropout", *TOKENIZER_FIELDS)]


def pad_vocab(n_vocab: int) -> int:
    """Embedding rows of a new model: `50257` → `50304`. A multiple of 64 keeps the head fast on GPUs."""
    return (n_vocab + 63) // 64 * 64


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout
        self.layer = layer  # not in nanoGPT: where the key-value cache keeps this block's keys and values
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head)
        if config.scale_attn_by_inverse_layer_idx:  # not in nanoGPT: some GPT-2s on the hub have it
            self.scale /= layer + 1

    def heads(self, x):
        """Queries, keys and values of x (B, T, C), each (B, nh, T, hs)."""
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        return q, k, v

    def forward(self, x, cache=None):
        B, T, C = x.size()
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # One query sees all keys. Several begin at position 0 (GPT.hidden checks it) and need a causal mask.
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=T > 1, scale=self.scale
        )  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def probabilities(self, x):
        """Attention matrices (B, nh, T, T) of x (B, T, C), without dropout, for analyze.py."""
        q, k, _ = self.heads(x)
        future = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).triu(1)
        return (q @ k.mT * self.scale).masked_fill(future, -math.inf).softmax(dim=-1)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh")  # nanoGPT has the exact one; GPT-2 was trained with this one
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        x = self.dropout(x)
        return x


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, recompute="none"):
        """The block's output (B, T, C). `recompute` trades time for memory in the backward pass: "none" keeps
        all activations, "cheap" recomputes norms and GELU (see keep_products), "full" the block from x."""
        if recompute == "none" or not torch.is_grad_enabled():
            return self.residual(x, cache)
        if recompute == "full":
            return checkpoint(self.residual, x, use_reentrant=False)
        keep = partial(create_selective_checkpoint_contexts, keep_products)
        return checkpoint(self.residual, x, use_reentrant=False, context_fn=keep)

    def residual(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = "none"  # or "cheap" or "full": Block.forward's `recompute`
        self.loss = cross_entropy  # a sharded model has a compiled one in its place
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        self.init_weights()

    def init_weights(self):
        """GPT-2's: std 0.02, and 0.02 / sqrt(2 n_layer) in the layers that write to the residual stream."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 1:  # LayerNorm weights
                nn.init.ones_(p)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                nn.init.normal_(p, std=0.02)

    @classmethod
    def from_pretrained(cls, name_or_folder: str) -> "GPT":
        """The fp32 model of a Hugging Face id, a folder of Hugging Face's GPT-2, or a checkpoint of ours.

        Raises UserError when it cannot be fetched or is not a GPT-2 that this file implements.
        """
        folder = find(name_or_folder)
        weights, config = gpt2_format.read_model(folder)
        model = cls.empty(GPTConfig(**config))
        model.fill(weights, folder)
        return model

    @classmethod
    def empty(cls, config: GPTConfig) -> "GPT":
        """A model with unset weights, to be filled: drawing random ones takes half a minute for GPT-2 XL."""
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        model.lm_head.weight = model.transformer.wte.weight  # to_empty has untied them
        return model

    @torch.no_grad()
    def fill(self, state: Mapping, source: str) -> None:
        """Copy a state dict in Hugging Face's layout, of any float dtype, into the parameters. Of a model
        with more positions the first ones are taken.

        Raises UserError, naming `source`, if a bias is not zero but the model has none. This happens when
        transformers has trained on: its config.json keeps `bias: false`.
        """
        parameters = dict(self.named_parameters())
        for name, tensor in state.items():
            if name in parameters:
                p = parameters[name]
                rows = tensor[: len(p)] if name == "transformer.wpe.weight" else tensor
                copy_rows(p.t() if name.endswith(gpt2_format.INPUT_FIRST) else p, rows)
            elif tensor[:].any():
                cure = "write bias: true there"
                raise UserError(f"{source}: {name} is not zero, but config.json says bias: false; {cure}")

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h

    @property
    def head(self) -> nn.Linear:
        return self.lm_head

    def num_params(self) -> int:
        """Parameters; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def embed(self, idx, start=0):
        """The embeddings (B, T, C) of ids idx (B, T) at positions `start`, start + 1, …: block 0's input."""
        pos = torch.arange(start, start + idx.size(1), dtype=torch.long, device=idx.device)  # (T,)
        return self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))

    def hidden(self, idx, cache=None):
        """Final hidden states (B, T, C) of ids idx (B, T). With a cache, idx follows the ids read so far.

        Raises ValueError when the context would outgrow block_size, and for T > 1 after other ids.
        """
        start = 0 if cache is None else cache.length
        T = idx.size(1)
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit block_size {self.config.block_size}")
        if start and T > 1:
            raise ValueError("a cache that holds tokens takes one more at a time")
        x = self.embed(idx, start)
        for block in self.transformer.h:
            x = block(x, cache, self.checkpoint_activations)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Logits (B, T, vocab_size) of ids idx (B, T); with targets (B, T), the mean loss, an fp32 scalar."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)
        return self.loss(x, self.lm_head, targets)

    def attention_steps(self, idx) -> Iterator[tuple[torch.Tensor | None, torch.Tensor]]:
        """Yield (None, embeddings (B, T, C)) of ids idx (B, T), then for each block its attention matrices
        (B, nh, T, T) and its output (B, T, C)."""
        x = self.embed(idx)
        yield None, x
        for block in self.transformer.h:
            A, x = block.attn.probabilities(block.ln_1(x)), block(x)
            yield A, x

    def read(self, idx, cache, room):
        """(logits (B, vocab_size) after ids idx (B, T), a cache that holds idx too). None: a cache for `room`
        ids is made."""
        if cache is None:
            wte = self.transformer.wte.weight
            cache = KVCache(self.config, idx.size(0), room, wte.device, wte.dtype)
        return self.lm_head(self.hidden(idx, cache)[:, -1]), cache

    @torch.inference_mode()
    def generate(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None
    ) -> Iterator[torch.Tensor]:
        """Continue each row of ids idx (B, T), T ≥ 1. Yields the next ids (B,), on the CPU, step after step.

        temperature: 0 takes the likeliest id.
        top_k, top_p: draw from the k likeliest ids, from the likeliest ones that make up probability p.
        generator: torch's, on the CPU.

        A row that has drawn end-of-text repeats it, and generation ends when every row has. When the context
        is full, the last block_size/2 tokens are read anew, because learned positions forbid sliding the
        cache.
        """
        limit, eot = self.config.limit, self.config.eot
        room = min(limit, idx.size(1) + max_new_tokens)
        done = torch.zeros(idx.size(0), dtype=torch.bool)
        idx, cache = idx[:, -limit:], None
        for _ in range(max_new_tokens):
            if idx.size(1) > limit:
                idx, cache = idx[:, -max(1, limit // 2) :], None
            with sdpa_kernel(SAMPLING_KERNELS):
                logits, cache = self.read(idx if cache is None else idx[:, -1:], cache, room)
            logits = logits.float()[:, : self.config.n_vocab]
            token = next_token(logits, temperature, top_k, top_p, generator)
            token = torch.where(done, eot, token)
            done |= token == eot
            # no need to wait for the device here: next_token has just done so
            idx = torch.cat((idx, token[:, None].to(idx.device, non_blocking=True)), dim=1)
            yield token
            if done.all():
                return


def cross_entropy(x, head, targets):
    """The mean loss, an fp32 scalar, of hidden states x (B, T, C) under a linear head, for targets (B, T).

    Not in nanoGPT: to save memory, torch computes the fp32 loss and its gradient in chunks of LOSS_ROWS rows.
    It takes all rows at once under autocast and for x of 16 bits (the chunked function rounds the loss to 16
    bits), when compiling (it breaks the graph), with a head that is no plain nn.Linear (training's
    PaddedHead), and in torch before 2.13.
    """
    whole = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
    if whole or type(head) is not nn.Linear or x.dtype != torch.float32 or not CHUNKED_LOSS:
        return F.cross_entropy(head(x).flatten(0, 1).float(), targets.flatten())
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=LOSS_ROWS, acc_policy="compact")
    return F.linear_cross_entropy(
        x.flatten(0, 1), head.weight, targets.flatten(), linear_bias=head.bias, options=options
    )


def keep_products(ctx, op, *args, **kwargs):
    """The policy of recompute="cheap": keep what matrix products and attention return, recompute the rest.

    It does not keep the last product (4C → C), which no gradient in the block needs, nor attention with
    dropout: the block draws all its random numbers again, in order, and may skip none.
    """
    aten = torch.ops.aten
    if op in (aten.mm.default, aten.addmm.default):
        n_in, n_out = args[-1].shape
        keep = n_in <= n_out
    else:
        dropout = any(isinstance(a, float) and a > 0 for a in args)  # dropout_p; other floats are in kwargs
        keep = "scaled_dot_product" in op.name() and not dropout
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class KVCache:
    """Keys and values of every block for the tokens read so far, in memory for `room` tokens."""

    def __init__(self, config: GPTConfig, B: int, room: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, B, config.n_head, room, config.n_embd // config.n_head)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # (n_layer, B, nh, room, hs)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens read; GPT.hidden adds to it after the last block

    def append(self, layer, k, v):
        """Append a block's k, v (B, nh, T, hs). Returns all of its keys, values (B, nh, length+T, hs)."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def next_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one id per row of logits (B, V): (B,) int64 on the CPU. See GPT.generate for the arguments.

    Raises UserError when the largest logit is not finite.
    """
    if temperature < GREEDY:
        best, token = logits.max(dim=-1)  # NaN counts as the largest
        token = torch.where(best.isfinite(), token, -1).cpu()
    else:
        logits = logits / temperature
        if top_k is not None and top_k < logits.size(-1):
            kth = logits.topk(top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -math.inf)
        probs = logits.softmax(dim=-1)
        if top_p is not None and top_p < 1:
            ordered, ids = probs.sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered  # mass of likelier ids; 0 for the first, so it stays
            probs = torch.zeros_like(probs).scatter(-1, ids, ordered.masked_fill(before >= top_p, 0.0))
        # Drawn on the CPU, which gives the same ids for the same probabilities and, unlike Apple GPUs, has
        # float64: fp32 sums over 50,000 ids are too coarse. (torch.multinomial draws a number per id.)
        cdf = probs.cpu().double().cumsum(dim=-1)  # (B, V); ends at what top_p left of 1
        u = torch.rand(len(probs), 1, generator=generator).double() * cdf[:, -1:]
        token = torch.searchsorted(cdf, u, right=True)[:, 0]  # right: never an id of probability 0
        token = torch.where(cdf[:, -1].isfinite(), token, -1)
    if (token < 0).any():
        raise UserError("the model's weights, or its activations in this dtype, are not finite")
    return token
