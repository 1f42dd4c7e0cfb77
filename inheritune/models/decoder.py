"""Causal models of transformers that are no GPT-2 of model.py, under the interface of interface.py.

This is the one place that knows transformers (requirements-extra.txt), which is imported when such a folder
is opened. A DecoderConfig carries config.json whole, as text, and asks transformers for everything else: a
skeleton, which is the model with its buffers but without its weights, tells names, shapes and sizes.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from inheritune.base.errors import UserError
from inheritune.base.files import read_json
from inheritune.weights.gpt2_format import CONFIG, NO_EOT, find_tokenizer, stored_tensors
from inheritune.weights.tensors import Lazy, copy_rows
from model import cross_entropy, next_token

BLOCK_SIZE = 1024  # tokens that a run reads at once, unless the model has room for fewer or the user says
NO_LIMIT = 2**30  # positions of a model whose configuration names no limit


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A causal model of transformers: its config.json, and what is asked of every model."""

    source: str  # config.json, as text
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

    scratch_settings = None  # train.py has none for it: only config.json describes it

    def __post_init__(self):
        kind = json.loads(self.source)["model_type"]
        if self.dropout:
            raise UserError(
                f"dropout {self.dropout} is implemented for GPT-2 only, not for {kind}: leave it out"
            )
        if not 0 < self.block_size <= self.limit:
            raise UserError(
                f"block_size {self.block_size}: a {kind} of this size reads 1 to {self.limit} tokens"
            )

    @classmethod
    def from_folder(cls, folder: str) -> "DecoderConfig":
        """The config of a transformers folder. Raises UserError when it is none with one stack of blocks."""
        return cls.from_content(read_json(os.path.join(folder, CONFIG)), folder)

    @classmethod
    def from_content(cls, content: dict, folder: str) -> "DecoderConfig":
        """The config of config.json's content; the tokenizer is looked for in `folder`, which errors name."""
        source = json.dumps(content)
        c = transformers_config(source, folder)
        eot = c.eos_token_id[0] if isinstance(c.eos_token_id, list) and c.eos_token_id else c.eos_token_id
        limit = getattr(c, "max_position_embeddings", None)
        limit = limit if type(limit) is int and limit > 0 else NO_LIMIT
        config = cls(
            source=source,
            n_layer=c.num_hidden_layers,
            n_head=getattr(c, "num_attention_heads", None) or 0,
            n_embd=c.hidden_size,
            vocab_size=c.vocab_size,
            n_vocab=content.get("n_vocab", c.vocab_size),
            tokenizer=content.get("tokenizer") or find_tokenizer(folder),
            eot=eot if type(eot) is int and 0 <= eot < c.vocab_size else NO_EOT,
            limit=limit,
            block_size=content.get("run_block_size", min(BLOCK_SIZE, limit)),
        )
        config.skeleton(folder)  # transformers builds it, and it has one stack of blocks
        return config

    def skeleton(self, folder: str = "the model") -> nn.Module:
        """transformers' model, its parameters on the meta device; shared, so never to be changed."""
        return build_skeleton(self.source, folder)

    @property
    def block_prefix(self) -> str:
        return find_blocks(self.skeleton(), self.n_layer)[0]

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.skeleton().parameters())

    @property
    def block_params(self) -> int:
        blocks = find_blocks(self.skeleton(), self.n_layer)[1]
        return max(sum(p.numel() for p in block.parameters()) for block in blocks)

    @property
    def flops_per_token(self) -> int:
        """6 per parameter of a matrix product that a token takes part in, and 12 L (heads × head size) T.

        Parameters of two or more dimensions are matrices, but for embeddings that are looked up alone; of a
        mixture's experts those count that a token is sent to.
        """
        model, c = self.skeleton(), transformers_config(self.source)
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        head = model.get_output_embeddings()
        looked_up -= {id(head.weight)} if head is not None else set()
        experts = getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None) or 1
        share = (getattr(c, "num_experts_per_tok", None) or experts) / experts
        matrices = sum(
            p.numel() * (share if p.dim() == 3 and p.shape[0] == experts else 1)
            for p in model.parameters()
            if p.dim() > 1 and id(p) not in looked_up
        )
        width = self.n_head * (getattr(c, "head_dim", None) or self.n_embd // max(1, self.n_head))
        return int(6 * matrices) + 12 * self.n_layer * width * self.block_size

    def with_blocks(self, blocks: list[int]) -> "DecoderConfig":
        """The config of the model with these blocks. Raises UserError when its config.json cannot say so."""
        content = json.loads(self.source)
        full = transformers_config(self.source).to_dict()
        content |= {
            key: [v[i] for i in blocks] for key, v in full.items() if is_per_layer(key, v, self.n_layer)
        }
        content |= {"num_hidden_layers": len(blocks)}
        new = dataclasses.replace(self, source=json.dumps(content), n_layer=len(blocks))
        new.skeleton()
        return new

    def content(self) -> dict:
        """config.json: the source's, fp32, and keys of ours where transformers has no room for them."""
        content = json.loads(self.source)
        content |= {key: "float32" for key in ("torch_dtype", "dtype") if key in content}
        ours = {"n_vocab": self.n_vocab, "tokenizer": self.tokenizer, "run_block_size": self.block_size}
        plain = {"n_vocab": self.vocab_size, "run_block_size": min(BLOCK_SIZE, self.limit)}
        kept = {
            key: value for key, value in ours.items() if value not in (plain.get(key), "", "tokenizer.json")
        }
        return {key: value for key, value in content.items() if key not in ours} | kept

    def arrange(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A model's parameters under the names and in the shapes in which transformers stores them."""
        names = {name for name, _ in self.skeleton().named_parameters()}
        state = {
            n: p.detach().to("cpu", torch.float32).contiguous() for n, p in parameters.items() if n in names
        }
        return stored_form(self.skeleton(), state)


def is_per_layer(key: str, value, n: int) -> bool:
    return isinstance(value, list) and len(value) == n and key not in ("architectures", "eos_token_id")


class Decoder(nn.Module):
    """A causal model of transformers. Its children are those of transformers' own model, so its parameters
    have their names. It is never in training mode: there is no dropout, no layer is dropped and no router
    gets noise. No term that balances a mixture's experts is added to the loss."""

    def __init__(self, config: DecoderConfig, unset=False):
        super().__init__()
        self.config = config
        with no_weights() if unset else contextlib.nullcontext():
            theirs = build(config.source)
        theirs.tie_weights()
        # in a tuple, so that neither is a child: parameters would have other names, or two
        self._held = theirs.eval(), find_blocks(theirs, config.n_layer)[1]
        self._modules, self._parameters, self._buffers = theirs._modules, theirs._parameters, theirs._buffers
        self._activations, self.plain_head = "none", False
        if not unset:
            self.plain_head = has_plain_head(theirs)

    @classmethod
    def empty(cls, config: DecoderConfig) -> "Decoder":
        """A model with unset weights, to be filled."""
        return cls(config, unset=True)

    def fill(self, state: Mapping, source: str) -> None:
        """Copy a folder's state dict of any float dtype into the parameters and stored buffers."""
        own = own_tensors(self.theirs)
        if state.keys() != own.keys():  # transformers stores them in another form: it turns them into its own
            whole = {name: tensor[:].float() for name, tensor in state.items()}
            with cannot_open(source):
                c = transformers_config(self.config.source)
                state = own_tensors(type(self.theirs).from_pretrained(None, config=c, state_dict=whole))
        with torch.no_grad():
            for name, tensor in own.items():
                copy_rows(tensor, state[name])
        self.plain_head = has_plain_head(self.theirs)

    @property
    def theirs(self) -> nn.Module:
        """transformers' model, which shares all modules and parameters."""
        return self._held[0]

    @property
    def blocks(self) -> nn.ModuleList:
        return self._held[1]

    @property
    def head(self) -> nn.Module:
        return self.theirs.get_output_embeddings()

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def train(self, mode: bool = True) -> "Decoder":
        """Nothing: see the class."""
        return self

    @property
    def checkpoint_activations(self) -> str:
        """What the backward pass recomputes: nothing ("none"), or each block from its input ("full")."""
        return self._activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, value: str) -> None:
        if value not in ("none", "full"):
            kind = self.theirs.config.model_type
            raise UserError(
                f"checkpoint_activations={value} is implemented for GPT-2 only, not for {kind}: use full"
            )
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
        if targets is None:
            return self.theirs(input_ids=idx, use_cache=False).logits
        if self.plain_head:
            return cross_entropy(self.hidden(idx), self.head, targets)
        logits = self.theirs(input_ids=idx, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.inference_mode()
    def generate(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None
    ) -> Iterator[Tensor]:
        """Continue each row of ids idx (B, T): see GPT.generate."""
        takes, c = inspect.signature(self.theirs.forward).parameters, self.config
        flags = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        cached, cache = "past_key_values" in takes, None
        done = torch.zeros(idx.size(0), dtype=torch.bool)
        idx = idx[:, -c.limit :]
        for _ in range(max_new_tokens):
            if idx.size(1) > c.limit:
                idx, cache = idx[:, -max(1, c.limit // 2) :], None
            flags |= {"past_key_values": cache} if cache is not None else {}
            out = self.theirs(input_ids=idx if cache is None else idx[:, -1:], use_cache=cached, **flags)
            cache = out.past_key_values if cached else None
            logits = out.logits[:, -1].float()[:, : c.n_vocab]  # (B, n_vocab)
            token = next_token(logits, temperature, top_k, top_p, generator)
            token = torch.where(done, c.eot, token)
            done |= token == c.eot
            idx = torch.cat((idx, token[:, None].to(idx.device)), dim=1)
            yield token
            if done.all():
                return

    def attention_steps(self, idx: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Yield (None, what enters block 0 (B, T, C)), then for each block (its attention matrices
        (B, nh, T, T) or None, its output). The matrices of all layers are in memory at once."""
        inputs, outputs = [], []

        def record(_block, args, kwargs, output):
            inputs.append(args[0] if args else kwargs["hidden_states"])
            outputs.append(output[0] if isinstance(output, (tuple, list)) else output)

        implementation = self.theirs.config._attn_implementation
        with contextlib.ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_hook(record, with_kwargs=True).remove)
            self.theirs.set_attn_implementation("eager")
            stack.callback(self.theirs.set_attn_implementation, implementation)
            result = self.theirs(input_ids=idx, use_cache=False, output_attentions=True)
        matrices = getattr(result, "attentions", None) or ()
        yield None, inputs[0]
        yield from zip(
            matrices if len(matrices) == len(outputs) else [None] * len(outputs), outputs, strict=True
        )


def recomputed(forward: Callable, *args, **kwargs):
    """forward(…), whose backward pass recomputes it from its arguments."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def read_decoder(folder: str, config: DecoderConfig) -> dict[str, Lazy]:
    """The state dict of a folder, checked against `config`: names and shapes as transformers stores them.

    A missing base prefix (`layers.0.…` for `model.layers.0.…`) is added. A tied tensor that the folder holds
    a second time, and what transformers leaves out itself, are left out.
    """
    model = config.skeleton(folder)
    wanted = {n: tuple(t.shape) for n, t in stored_form(model, own_tensors(model)).items()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    tensors = {}
    for name, tensor in stored_tensors(folder):
        longer = f"{model.base_model_prefix}.{name}"
        name = longer if name not in wanted and longer in wanted else name
        tied = model.all_tied_weights_keys.get(name)
        if name in wanted or not (tied in wanted or any(p.search(name) for p in ignored)):
            tensors[name] = tensor
    wrong = [f"{n} is missing" for n in wanted if n not in tensors]
    wrong += [f"{n} is no tensor of a {model.config.model_type}" for n in tensors if n not in wanted]
    shapes = {n: tuple(t.shape) for n, t in tensors.items() if n in wanted}
    wrong += [f"{n} is {s}, config.json says {wanted[n]}" for n, s in shapes.items() if s != wanted[n]]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"{folder}: {'; '.join(wrong[:3])}{more}")
    return tensors


def transformers_config(source: str, folder: str = "the model"):
    """transformers' configuration of a config.json. Code in the folder is never run."""
    with cannot_open(folder) as transformers:
        content = json.loads(source)
        c = transformers.CONFIG_MAPPING[content.get("model_type")].from_dict(content)
    if c.get_text_config(decoder=True) is not c:
        raise UserError(f"{folder} holds more than a text model: only models of text alone are implemented")
    lacking = [
        n for n in ("num_hidden_layers", "hidden_size", "vocab_size") if type(getattr(c, n, None)) is not int
    ]
    if lacking:
        raise UserError(f"{folder}: a {c.model_type} has no {', '.join(lacking)}; it cannot be opened here")
    return c


def build(source: str, folder: str = "the model") -> nn.Module:
    """transformers' fp32 model of a config.json, with random weights."""
    c = transformers_config(source, folder)
    if getattr(c, "quantization_config", None):
        raise UserError(f"{folder} is quantised: save it in 16 or 32 bits first (transformers' dequantize)")
    with cannot_open(folder) as transformers:
        return transformers.AutoModelForCausalLM.from_config(c, dtype=torch.float32)


@functools.lru_cache(maxsize=8)
def build_skeleton(source: str, folder: str) -> nn.Module:
    """`build` with parameters on the meta device, and buffers as they are."""
    register = nn.Module.register_parameter

    def on_meta(self, name, parameter):
        parameter = None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        with no_weights():
            model = build(source, folder)
    finally:
        nn.Module.register_parameter = register
    model.tie_weights()
    find_blocks(model, model.config.num_hidden_layers, folder)
    return model


def no_weights():
    """The context in which transformers' models are built without computing random weights."""
    from transformers.initialization import no_init_weights

    return no_init_weights()


def find_blocks(model: nn.Module, n: int, folder: str = "the model") -> tuple[str, nn.ModuleList]:
    """(what the names of its tensors begin with, the list of all n blocks) of a model of transformers."""
    lists = [
        (f"{name}.", m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n
    ]
    if len(lists) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        raise UserError(
            f"{folder}: a {model.config.model_type} is no single stack of {n} blocks (found: {found})"
        )
    return lists[0]


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers of a model of transformers by name; tied ones once."""
    stored = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in stored.items() if name not in model.all_tied_weights_keys}


def stored_form(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in transformers' own names as it is stored: for example, with a layer's experts apart."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


@torch.no_grad()
def has_plain_head(model: nn.Module) -> bool:
    """Whether logits are what a linear head makes of the base model's output, without a soft cap or a factor.
    The head is made to return large numbers, which must come out as they are."""
    head, seen = model.get_output_embeddings(), {}
    if not isinstance(head, nn.Linear) or model.base_model is model:
        return False

    def replace(_module, args, output):
        seen["input"] = args[0]
        seen["output"] = torch.linspace(-300, 300, output.numel()).view_as(output)
        return seen["output"]

    idx = torch.zeros(1, 4, dtype=torch.int64, device=head.weight.device)
    handle = head.register_forward_hook(replace)
    try:
        logits = model(input_ids=idx, use_cache=False).logits
    finally:
        handle.remove()
    x = model.base_model(input_ids=idx, use_cache=False).last_hidden_state
    return bool(seen) and torch.equal(logits, seen["output"]) and torch.allclose(x, seen["input"], rtol=1e-6)


@contextlib.contextmanager
def cannot_open(folder: str) -> Iterator:
    """Yield the package transformers, without its messages; whatever it raises is a UserError of one line."""
    try:
        import transformers
    except ImportError:  # needs an extra package
        cure = "for others: pip install -r requirements-extra.txt"
        raise UserError(f"{folder} is no GPT-2 of ours; {cure}") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield transformers
    except UserError:
        raise
    except Exception as e:  # transformers raises what it likes: treat all of it as: cannot be opened
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"transformers cannot open {folder} ({type(e).__name__}: {reason:.150})") from None
