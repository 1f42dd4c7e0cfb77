"""nanoGPT's `ckpt.pt`, read as if it were a checkpoint folder: the one pickle that this repository opens.

It is opened with torch's restricted unpickler, which makes tensors and plain values and calls nothing else. nanoGPT's
GELU is the exact one, ours GPT-2's tanh approximation: the same weights give very slightly different losses.
"""

import re
import zipfile

import torch

from inheritune.base.errors import UserError
from inheritune.weights import gpt2_format
from inheritune.weights.tensors import check_finite

GPT2_SIZES = (50257, 50304)  # GPT-2's vocabulary, and padded as nanoGPT does


class Tensors(dict):
    """{canonical name: tensor in Hugging Face's orientation}, with what gpt2_format.Weights has besides."""

    folder: str


def read(path):
    """(Tensors, configuration) of a nanoGPT checkpoint, not yet checked against each other. Raises UserError."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no nanoGPT checkpoint: not a file that torch.save wrote, or cut off")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # whatever a damaged or hostile pickle makes the reader do
        raise UserError(
            f"{path} is no whole nanoGPT checkpoint of tensors and plain values ({type(e).__name__})"
        ) from None
    try:
        if not isinstance(saved, dict):
            raise TypeError
        arguments, state = saved["model_args"], saved["model"]
        sizes = {key: arguments[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
        bias = arguments.get("bias", True)  # early versions always had them
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{path} lacks nanoGPT's model_args or model") from None
    most = gpt2_format.MOST | {"block_size": gpt2_format.MOST["n_positions"]}
    bad = [f"{k} is {v!r:.50}" for k, v in sizes.items() if type(v) is not int or not 0 < v <= most[k]]
    if not bad and sizes["n_embd"] % sizes["n_head"]:
        bad.append(f"n_embd {sizes['n_embd']} is not a multiple of n_head {sizes['n_head']}")
    if type(bias) is not bool:
        bad.append(f"bias is {bias!r:.50}")
    if bad or not isinstance(state, dict):
        raise UserError(f"{path}: {', '.join(bad) or 'model is no dict of tensors'}")
    known = sizes["vocab_size"] in GPT2_SIZES
    n_vocab = GPT2_SIZES[0] if known else sizes["vocab_size"]
    config = {
        "dropout": 0.0,
        "scale_attn_by_inverse_layer_idx": False,
        "bias": bias,
        "n_vocab": n_vocab,
        "eot": n_vocab - 1,
    }
    config |= sizes | {"tokenizer": "gpt2" if known else ""}
    return canonical(path, state, config), config


def canonical(path, state, config):
    """The Tensors of a nanoGPT state dict: without the prefix that torch.compile leaves, causal-mask buffers and the
    tied head's copy; transposed where Hugging Face's are, with zeros for the biases it lacks. Raises UserError."""
    tensors = Tensors()
    tensors.folder = path
    for key, tensor in state.items():
        name = str(key).removeprefix("_orig_mod.")
        if name == "lm_head.weight" or re.search(r"\.attn\.(bias|masked_bias)$", name):
            continue
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.layout != torch.strided
            or not tensor.is_floating_point()
        ):
            raise UserError(f"{path}: {name:.80} is not a tensor of floating-point numbers")
        if name in tensors:
            raise UserError(f"{path} holds {name:.80} twice")
        check_finite(tensor, name, path)
        turned = name.endswith(gpt2_format.INPUT_FIRST) and tensor.dim() == 2
        tensors[name] = (tensor.t() if turned else tensor).detach().contiguous()
    if not config["bias"]:
        wanted = gpt2_format.shapes(config)
        tensors |= {n: torch.zeros(wanted[n]) for n in wanted if n.endswith("bias") and n not in tensors}
    return tensors
