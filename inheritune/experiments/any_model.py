"""Any causal model that transformers opens, as attention_metrics.py needs it: its attention matrices, its
residual stream, and its loss without each block.

Blocks are reached by hooks, never by an architecture's own names. Needs the package transformers
(requirements-extra.txt); a GPT-2 that model.py implements needs nothing of this.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from inheritune.base.errors import UserError
from inheritune.weights.any_layout import open_by


@dataclass
class AnyConfig:
    """What the analysis asks of a model's configuration, by the names of model.GPTConfig."""

    n_layer: int
    n_head: int
    block_size: int
    n_vocab: int
    tokenizer: str

    @property
    def vocab_size(self) -> int:
        return self.n_vocab

    @classmethod
    def from_folder(cls, folder: str) -> "AnyConfig":
        """The configuration of a transformers folder. Raises UserError when transformers does not know it."""
        c = open_by("AutoConfig", folder).get_text_config(decoder=True)
        try:
            n_layer, n_head, n_vocab = c.num_hidden_layers, c.num_attention_heads, c.vocab_size
        except AttributeError:
            raise UserError(f"{folder}: {no_attention(c, 'none of its layers')}") from None
        block_size = getattr(c, "max_position_embeddings", None) or 1 << 30  # some have no limit
        tokenizer = "tokenizer.json" if os.path.exists(os.path.join(folder, "tokenizer.json")) else ""
        return cls(n_layer, n_head, block_size, n_vocab, tokenizer)


class AnyModel(torch.nn.Module):
    """A causal model of transformers with `walk` and `skip_losses`; what it reads are ids (B, T) int64."""

    def __init__(self, model, config: AnyConfig):
        super().__init__()
        self.model, self.config = model, config
        lists = (
            m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.n_layer
        )
        self.blocks = next(lists, ())

    @classmethod
    def from_pretrained(cls, folder: str) -> "AnyModel":
        """The model of a transformers folder, fp32 on the CPU. Raises UserError when it cannot be opened, or
        a layer of it has no attention matrix."""
        model, report = open_by(
            "AutoModelForCausalLM",
            folder,
            attn_implementation="eager",
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            raise UserError(
                f"{folder} lacks the weights of {sorted(report['missing_keys'])[0]}: fetch it again"
            )
        self = cls(model, AnyConfig.from_folder(folder)).eval()
        self.check(folder)
        return self

    @torch.inference_mode()
    def check(self, folder: str) -> None:
        """Raise UserError unless each layer gives one attention matrix for each head."""
        c = self.config
        out = self.model(torch.zeros(1, 2, dtype=torch.int64), output_attentions=True, use_cache=False)
        given = [A for A in getattr(out, "attentions", None) or () if A is not None]
        if len(given) != c.n_layer or len(self.blocks) != c.n_layer:
            which = f"only {len(given)} of its {c.n_layer} layers" if given else "none of its layers"
            raise UserError(f"{folder}: {no_attention(self.model.config, which)}")
        if {tuple(A.shape) for A in given} != {(1, c.n_head, 2, 2)}:
            raise UserError(
                f"{folder}: its layers do not all have {c.n_head} heads, which is not implemented"
            )

    def run(self, idx: Tensor, **flags) -> tuple[list[Tensor], list, object]:
        """(inputs, outputs, result) of a forward pass: the residual stream (B, T, C) that enters each block,
        what each block returns, and what the model returns."""
        inputs, outputs = [], []

        def record(_block, args, kwargs, output):
            inputs.append(args[0] if args else kwargs["hidden_states"])
            outputs.append(output)

        with contextlib.ExitStack() as hooks:
            for block in self.blocks:
                handle = block.register_forward_hook(record, with_kwargs=True)
                hooks.callback(handle.remove)
            result = self.model(idx, use_cache=False, **flags)
        return inputs, outputs, result

    def walk(self, idx: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Yield (None, what enters block 0), then for each block (its attention matrices (B, nh, T, T), what
        leaves it). The matrices of all layers are in memory at once."""
        inputs, outputs, result = self.run(idx, output_attentions=True)
        yield None, inputs[0]
        for A, output in zip(result.attentions, outputs, strict=True):
            yield A, output[0] if isinstance(output, tuple) else output

    def skip_losses(self, idx: Tensor, targets: Tensor, title: str | None) -> tuple[float, list[float]]:
        """`attention_metrics.skip_losses`, one window at a time."""
        n, device = self.config.n_layer, next(self.parameters()).device
        sums = torch.zeros(n + 1).double()  # the last one is the complete model
        with tqdm(total=len(idx) * (n + 1), desc=title, unit="loss", disable=title is None) as bar:
            for part, y in zip(idx.to(device).split(1), targets.to(device), strict=True):
                inputs, outputs, result = self.run(part)
                sums[n] += total_loss(result.logits, y)
                for i in range(n):  # blocks 0 … i all give what enters block i
                    tail = outputs[i][1:] if isinstance(outputs[i], tuple) else None
                    given = inputs[i] if tail is None else (inputs[i], *tail)
                    with replaced(self.blocks[: i + 1], lambda *_, given=given, **__: given):
                        sums[i] += total_loss(self.model(part, use_cache=False).logits, y)
                bar.update(n + 1)
        *skipped, complete = (sums / idx.numel()).tolist()
        return complete, skipped


@contextlib.contextmanager
def replaced(blocks, forward: Callable) -> Iterator[None]:
    """Blocks run `forward` instead of their own; they keep their attributes, which some models look at."""
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def total_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits (1, T, V) and targets (T,), summed, in nats."""
    return F.cross_entropy(logits[0].float(), y, reduction="sum").cpu().double()


def no_attention(config, which: str) -> str:
    """The reason why a model cannot be analysed."""
    kinds = ", ".join(sorted(set(getattr(config, "layer_types", None) or ())))
    kinds = f" (they are {kinds})" if kinds else ""
    return f"{which} give attention matrices{kinds}; {config.model_type} cannot be analysed"
