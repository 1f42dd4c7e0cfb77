"""What transformers makes of a config.json: its configuration, its model, and a skeleton of its model.

A skeleton has all modules and buffers of a model, but its parameters lie on the meta device and take no
memory. It tells the names, shapes and modules of a model of any size in a second. `source` is the text of a
config.json throughout.
"""

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from inheritune.base.errors import UserError, first_line


@contextlib.contextmanager
def using_transformers(what: str = "it") -> Iterator:
    """Yield the package transformers, without its messages; whatever it raises is a UserError of one line."""
    try:
        import transformers
    except ImportError:  # needs an extra package
        cure = "pip install -r requirements-extra.txt"
        raise UserError(f"this is no GPT-2 of model.py; for other models: {cure}") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield transformers
    except UserError:
        raise
    except Exception as e:  # transformers raises errors of any class: each means that it cannot open this
        reason = f"{type(e).__name__}: {first_line(e):.150}"
        raise UserError(f"transformers cannot open {what} ({reason})") from None


def transformers_config(source: str):
    """transformers' configuration. Code in a folder is never run. Raises UserError."""
    content = json.loads(source)
    with using_transformers() as transformers, tempfile.TemporaryDirectory() as folder:
        if content.get("model_type") not in transformers.CONFIG_MAPPING:
            known = f"transformers {transformers.__version__} has no model_type {content.get('model_type')!r}"
            raise UserError(f"{known}; code in a folder is never run")
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
            f.write(source)
        c = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if c.get_text_config(decoder=True) is not c:
        raise UserError(f"a {c.model_type} holds more than a text model: only models of text are implemented")
    wanted = ("num_hidden_layers", "hidden_size", "vocab_size")
    lacking = [name for name in wanted if type(getattr(c, name, None)) is not int]
    if lacking:
        raise UserError(f"a {c.model_type} has no {', '.join(lacking)}: it is no stack of blocks")
    return c


def build(source: str, unset: bool = False) -> nn.Module:
    """transformers' fp32 model with random weights, or with unset ones. Raises UserError."""
    c = transformers_config(source)
    if getattr(c, "quantization_config", None):
        raise UserError("it is quantised: save it in 16 or 32 bits first (transformers' dequantize)")
    with using_transformers() as transformers:
        from transformers.initialization import no_init_weights

        with no_init_weights() if unset else contextlib.nullcontext():
            return transformers.AutoModelForCausalLM.from_config(c, dtype=torch.float32)


@functools.lru_cache(maxsize=8)
def skeleton(source: str) -> nn.Module:
    """The skeleton of a model, which is shared: callers must not change it. Raises UserError."""
    register = nn.Module.register_parameter

    def on_meta(self, name, parameter):
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        model = build(source, unset=True)
    finally:
        nn.Module.register_parameter = register
    model.tie_weights()
    find_blocks(model)
    return model


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(prefix of the block tensors' names, list of all blocks) of a model. Raises UserError."""
    n, named = model.config.num_hidden_layers, model.named_modules()
    lists = [(f"{name}.", m) for name, m in named if isinstance(m, nn.ModuleList) and len(m) == n]
    if len(lists) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        what = f"a {model.config.model_type} is no single stack of {n} blocks"
        raise UserError(f"{what} (lists of so many modules: {found})")
    return lists[0]


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers of a model of transformers by its own names; tied ones once."""
    stored = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in stored.items() if name not in model.all_tied_weights_keys}


def stored_form(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict from transformers' names to a folder's, where each expert is apart."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


@functools.lru_cache(maxsize=8)
def stored_shapes(source: str) -> dict[str, tuple]:
    """{name: shape} of the tensors that a folder holds. Callers must not change it."""
    model = skeleton(source)
    return {name: tuple(t.shape) for name, t in stored_form(model, own_tensors(model)).items()}
