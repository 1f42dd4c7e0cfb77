"""Causal models of transformers that are no GPT-2 of model.py, under the interface of open_model.py.

Only this file, meta_model.py and cut_config.py know transformers (requirements-extra.txt), which is imported
when such a folder is opened. A DecoderConfig carries config.json whole, as text, and asks transformers for
everything else: a skeleton, which is the model with its buffers but without its weights, tells names, shapes
and sizes.
"""

import dataclasses
import functools
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from inheritune.base.errors import UserError
from inheritune.base.files import read_json
from inheritune.models.blocks import recorded
from inheritune.models.cut_config import cut_content
from inheritune.models.meta_model import (
    build,
    find_blocks,
    own_tensors,
    skeleton,
    stored_form,
    stored_shapes,
    transformers_config,
    using_transformers,
)
from inheritune.weights.gpt2_format import CONFIG, choose_tensors, read_tokenizer_fields, stored_tensors
from inheritune.weights.tensors import LazyTensor, copy_rows
from model import GPT, cross_entropy

BLOCK_SIZE = 1024  # block_size of a run, unless the model has room for fewer or the user sets it
OUR_KEYS = ("n_vocab", "tokenizer", "run_block_size")  # keys that we add to config.json
ATTENTION = ("_attn_implementation", "attn_implementation")  # a key that asks for a package of its author's
AHEAD = "num_nextn_predict_layers"  # blocks that predict a second token, which is not implemented
OLD_BUFFERS = r"rotary_emb[.]inv_freq$", r"(^|[.])position_ids$"  # computed now, but still in older folders
NO_LIMIT = 2**30  # positions of a model whose configuration names no limit


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A causal model of transformers: its config.json, and what is asked of every model."""

    source: str  # config.json without OUR_KEYS, as text
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    n_vocab: int  # ids that the tokenizer can decode
    tokenizer: str  # what tokenizer.load_tokenizer opens; "" when nothing says
    eot: int
    limit: int  # the most positions that the model can read
    block_size: int  # tokens that this run reads at once
    dropout: float = 0.0
    warning: str = dataclasses.field(default="", compare=False)  # what readers of a cut config.json must know

    recompute_choices = ("none", "full")  # the values of checkpoint_activations
    scratch_settings = None  # train.py has none for it: only config.json describes it
    has_parts = False  # what its blocks consist of differs from model to model
    scale_attn_by_inverse_layer_idx = False

    def __post_init__(self):
        if self.dropout:
            raise UserError(f"dropout {self.dropout} is implemented for GPT-2 only: leave it out")
        if not 0 < self.block_size <= self.limit:
            raise UserError(f"block_size {self.block_size}: this model reads 1 to {self.limit} tokens")

    @classmethod
    def from_folder(cls, folder: str) -> "DecoderConfig":
        """The config of a transformers folder. Raises UserError when it is none with one stack of blocks."""
        path = os.path.join(folder, CONFIG)
        content = read_json(path)
        content |= {AHEAD: 0} if content.get(AHEAD) else {}
        source = json.dumps({key: value for key, value in content.items() if key not in OUR_KEYS + ATTENTION})
        try:
            c = skeleton(source).config
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
        limit = getattr(c, "max_position_embeddings", None)
        limit = limit if type(limit) is int and limit > 0 else NO_LIMIT
        block_size = content.get("run_block_size", min(BLOCK_SIZE, limit))
        if type(block_size) is not int:
            raise UserError(f"{path}: run_block_size {block_size!r} is no whole number")
        return cls(
            source=source,
            n_layer=c.num_hidden_layers,
            n_head=getattr(c, "num_attention_heads", None) or 0,
            n_embd=c.hidden_size,
            vocab_size=c.vocab_size,
            limit=limit,
            block_size=block_size,
            **read_tokenizer_fields(
                path, content | {"eos_token_id": getattr(c, "eos_token_id", None)}, c.vocab_size
            ),
        )

    @property
    def block_prefix(self) -> str:
        return find_blocks(skeleton(self.source))[0]

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in skeleton(self.source).parameters())

    @property
    def block_params(self) -> int:
        blocks = find_blocks(skeleton(self.source))[1]
        return max(sum(p.numel() for p in block.parameters()) for block in blocks)

    @property
    def flops_per_token(self) -> int:
        """6 per parameter of a matrix product that a token takes part in, and 12 L (heads × head size) T.

        Matrices are the parameters of two or more dimensions, except embeddings that are only looked up. Of a
        mixture's experts, those count that a token is sent to.
        """
        model = skeleton(self.source)
        head, c = model.get_output_embeddings(), model.config
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        looked_up -= {id(head.weight)} if head is not None else set()
        matrices = 0
        for p in model.parameters():
            if p.dim() > 1 and id(p) not in looked_up:
                experts = p.shape[0] if p.dim() == 3 else 1
                matrices += p.numel() * min(1, (getattr(c, "num_experts_per_tok", None) or experts) / experts)
        width = self.n_head * (getattr(c, "head_dim", None) or self.n_embd // max(1, self.n_head))
        return int(6 * matrices) + 12 * self.n_layer * width * self.block_size

    def with_blocks(self, blocks: list[int]) -> "DecoderConfig":
        """The config of the model with these blocks. Raises UserError when its config.json cannot say so."""
        content, warning = cut_content(json.loads(self.source), blocks)
        return dataclasses.replace(self, source=json.dumps(content), n_layer=len(blocks), warning=warning)

    def content(self, dtype: torch.dtype = torch.float32) -> dict:
        """config.json: the source's with the dtype of the tensors beside it, plus our own keys."""
        content, name = json.loads(self.source), str(dtype).removeprefix("torch.")
        content.pop("auto_map", None)  # it names Python files, which are not copied
        content |= {key: name for key in ("torch_dtype", "dtype") if key in content}
        return content | dict(zip(OUR_KEYS, (self.n_vocab, self.tokenizer, self.block_size), strict=True))

    def full_content(self) -> dict:
        """config.json with transformers' defaults for what it leaves out."""
        return transformers_config(self.source).to_dict()

    def arrange(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model's parameters under the names and in the shapes in which transformers stores them."""
        model = skeleton(self.source)
        state = {name: parameters[name].detach().to("cpu", torch.float32) for name in own_tensors(model)}
        return {name: tensor.contiguous() for name, tensor in stored_form(model, state).items()}


class Decoder(nn.Module):
    """A causal model of transformers. Its children are those of transformers' own model, so its parameters
    have their names; stored buffers are parameters that are not trained. It is never in training mode: there
    is no dropout, no layer is dropped and no router gets noise. No term that balances a mixture's experts is
    added to the loss."""

    def __init__(self, config: DecoderConfig, unset=False):
        super().__init__()
        self.config = config
        theirs = build(config.source, unset)
        theirs.tie_weights()
        for module in theirs.modules():
            for name in module._buffers.keys() - module._non_persistent_buffers_set:
                buffer = module._buffers.pop(name)
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
        # transformers' model, which shares all modules and parameters, and its blocks; set past nn.Module,
        # because as children both would rename parameters, or list them twice
        vars(self).update(theirs=theirs, blocks=find_blocks(theirs)[1])
        self._modules, self._parameters, self._buffers = theirs._modules, theirs._parameters, theirs._buffers
        self._activations, self.plain_head = "none", False
        self.loss = cross_entropy  # a sharded model has a compiled one in its place
        self.train()
        if not unset:
            self.plain_head = probe(theirs, config.vocab_size)

    @classmethod
    def empty(cls, config: DecoderConfig) -> "Decoder":
        """A model with unset weights, to be filled."""
        return cls(config, unset=True)

    def fill(self, state: Mapping, source: str) -> None:
        """Copy a folder's state dict of any float dtype into the parameters and stored buffers."""
        own = own_tensors(self.theirs)
        if state.keys() != own.keys():  # the folder's form is not the model's: transformers converts it
            whole = {name: tensor[:].float() for name, tensor in state.items()}
            with using_transformers(source):
                c = transformers_config(self.config.source)
                state = own_tensors(type(self.theirs).from_pretrained(None, config=c, state_dict=whole))
        with torch.no_grad():
            for name, tensor in own.items():
                copy_rows(tensor, state[name])
        self.plain_head = probe(self.theirs, self.config.vocab_size)

    @property
    def head(self) -> nn.Module:
        return self.theirs.get_output_embeddings()

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> "Decoder":
        """It stays in eval mode: see the class."""
        self.theirs.train(False)
        return super().train(False)

    @property
    def checkpoint_activations(self) -> str:
        """What the backward pass recomputes: nothing ("none"), or each block from its input ("full")."""
        return self._activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: str) -> None:
        self._activations = value
        for block in self.blocks:
            vars(block).pop("forward", None)
            if value == "full":
                block.forward = functools.partial(recomputed, block.forward)

    def hidden(self, idx: Tensor) -> Tensor:
        """What enters the head (B, T, C), of ids idx (B, T)."""
        return self.theirs.base_model(input_ids=idx, use_cache=False).last_hidden_state

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab_size) of ids idx (B, T); with targets (B, T), the mean loss, an fp32 scalar."""
        if targets is not None and self.plain_head:
            return self.loss(self.hidden(idx), self.head, targets)
        logits = self.theirs(input_ids=idx, use_cache=False).logits
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    generate = GPT.generate

    def read(self, idx: Tensor, cache, room: int) -> tuple:
        """See GPT.read. The cache is transformers', None where the model has none."""
        takes = inspect.signature(self.theirs.forward).parameters
        name = next((name for name in ("past_key_values", "cache_params") if name in takes), None)
        options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        options |= {name: cache} if name else {}
        out = self.theirs(input_ids=idx, use_cache=bool(name), **options)
        return out.logits[:, -1], getattr(out, name, None) if name else None

    def attention_steps(self, idx: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Yield (None, what enters block 0 (B, T, C)), then for each block (its attention matrices
        (B, nh, T, T), its output). All are in memory at once.

        The matrices are None unless every block has one for each of n_head heads. Raises UserError when the
        output of a block is not what enters the next one.
        """
        usual, expected = self.theirs.config._attn_implementation, self(idx[:1])
        # only eager attention returns its matrices; blocks such as Falcon's cannot switch to it and go wrong
        for kind in dict.fromkeys(("eager", usual)):
            self.theirs.set_attn_implementation(kind)
            with recorded(self.blocks) as calls:
                result = self.theirs(input_ids=idx, use_cache=False, output_attentions=kind == "eager")
            if torch.allclose(result.logits[:1], expected, 1e-3, 1e-3):
                break
        self.theirs.set_attn_implementation(usual)
        (B, T), n = idx.shape, self.config.n_layer
        inputs = [x for x, _ in calls]
        outputs = [output[0] if isinstance(output, (tuple, list)) else output for _, output in calls]
        chain = len(calls) == n and all(map(torch.equal, inputs[1:], outputs))
        if not chain or {x.shape for x in (*inputs, *outputs)} != {(B, T, self.config.n_embd)}:
            kind = self.theirs.config.model_type
            raise UserError(f"the blocks of a {kind} do not pass hidden states on to one another")
        matrices = list(getattr(result, "attentions", None) or ())
        wanted = (B, self.config.n_head, T, T)
        if len(matrices) != n or any(A is None or A.shape != wanted or A.triu(1).any() for A in matrices):
            matrices = [None] * n  # not all of them are causal attention matrices
        yield None, inputs[0]
        yield from zip(matrices, outputs, strict=True)


def recomputed(forward: Callable, *args, **kwargs):
    """forward(…), whose backward pass recomputes it from its arguments."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def read_decoder(folder: str, config: DecoderConfig) -> dict[str, LazyTensor]:
    """The state dict of a folder, checked against `config`: names and shapes as transformers stores them.

    A missing base prefix (`layers.0.…` for `model.layers.0.…`) is added. Left out are a copy of a tied
    tensor, what transformers leaves out itself, buffers that older versions of it stored, and blocks that
    predict a second token.
    """
    model, wanted = skeleton(config.source), stored_shapes(config.source)
    ignored = [*OLD_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or ())]
    for i in range(read_json(os.path.join(folder, CONFIG)).get(AHEAD) or 0):
        number = config.n_layer + i
        ignored.append(f"^{re.escape(config.block_prefix)}{number}[.]")
        print(f"{folder}: block {number} predicts a second token and is left out", file=sys.stderr)
    kind, prefix, tied = model.config.model_type, model.base_model_prefix, model.all_tied_weights_keys
    return choose_tensors(stored_tensors(folder), wanted, folder, kind, prefix, tied, ignored)


@torch.no_grad()
def probe(model: nn.Module, vocab_size: int) -> bool:
    """Whether logits are what a linear head makes of the base model's output, without a soft cap or a factor.

    The head's output is made large, as a soft cap leaves small numbers almost as they are. Raises UserError
    for a model whose logits depend on later tokens: it is not causal, so its loss would mean nothing.
    """
    idx = torch.arange(8).remainder(vocab_size)[None]
    with using_transformers():
        logits = model(input_ids=idx, use_cache=False).logits
        changed = model(input_ids=idx.index_fill(1, torch.tensor(7), vocab_size - 1), use_cache=False).logits
    if logits.shape != (1, 8, vocab_size) or not torch.allclose(logits[:, :7], changed[:, :7], 1e-3, 1e-4):
        kind = model.config.model_type
        raise UserError(f"this {kind} is no causal model: it predicts a token with later ones in sight")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or model.base_model is model or not logits.any():
        return False
    scale = 300 / logits.abs().max()
    handle = head.register_forward_hook(lambda _module, _args, output: output * scale)
    logits = model(input_ids=idx, use_cache=False).logits
    handle.remove()
    x = model.base_model(input_ids=idx, use_cache=False).last_hidden_state
    return x.size(-1) == head.in_features and torch.allclose(logits, head(x) * scale, rtol=1e-6, atol=1e-3)
