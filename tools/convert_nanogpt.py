"""Convert nanoGPT's `ckpt.pt` into a checkpoint folder, once. This is the only pickle that the repository
opens.

    python tools/convert_nanogpt.py out/ckpt.pt out-converted

torch's restricted unpickler opens it, which makes tensors and plain values and calls nothing else. nanoGPT's
GELU is the exact one, ours GPT-2's tanh approximation: the same weights give very slightly different losses.
"""

import os
import sys
import zipfile

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # run from anywhere

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.data.tokenizer import load_tokenizer, tokenizer_files
from inheritune.weights.checkpoint import new_folder
from inheritune.weights.gpt2_format import (
    INPUT_FIRST,
    MASKS,
    check_architecture,
    check_weights,
    config_json,
    shapes,
    write_model,
)
from inheritune.weights.tensors import check_finite
from model import GPTConfig

GPT2_SIZES = (50257, 50304)  # GPT-2's vocabulary, and padded as nanoGPT does


def read_ckpt(path: str) -> tuple[dict, dict]:
    """(state dict, configuration without a tokenizer) of a nanoGPT checkpoint. Raises UserError."""
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
        args, state = saved["model_args"], saved["model"]
        config = {key: args[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
        bias = args.get("bias", True)  # early versions always had them
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{path} lacks nanoGPT's model_args or model") from None
    config |= {"dropout": 0.0, "bias": bias, "scale_attn_by_inverse_layer_idx": False}
    config |= {"n_vocab": config["vocab_size"], "tokenizer": "", "eot": 0}
    check_architecture(path, config_json(config))
    if type(bias) is not bool or not isinstance(state, dict):
        raise UserError(
            f"{path}: bias is {bias!r:.50}" if isinstance(state, dict) else f"{path}: model is no dict"
        )
    tensors = canonical(path, state, config)
    check_weights(tensors, config, path)
    return tensors, config


def canonical(path: str, state: dict, config: dict) -> dict[str, torch.Tensor]:
    """A nanoGPT state dict as gpt2_format.py has it: without torch.compile's prefix, causal-mask buffers and
    the tied head's copy; transposed where Hugging Face's are, with zeros for the biases it lacks. Raises
    UserError."""
    tensors = {}
    for key, tensor in state.items():
        name = str(key).removeprefix("_orig_mod.")
        if name == "lm_head.weight" or MASKS.search(name):
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
        turned = name.endswith(INPUT_FIRST) and tensor.dim() == 2
        tensors[name] = (tensor.t() if turned else tensor).detach().contiguous()
    if not config["bias"]:
        zeros = {name: shape for name, shape in shapes(config).items() if name.endswith("bias")}
        tensors = {name: torch.zeros(shape) for name, shape in zeros.items()} | tensors
    return tensors


def choose_tokenizer(name: str | None, vocab_size: int) -> dict:
    """The configuration's n_vocab, tokenizer and eot. nanoGPT's checkpoints do not say how their data was
    tokenised; GPT-2's sizes mean GPT-2's tokenizer unless `name` is given. Raises UserError."""
    if name is None and vocab_size in GPT2_SIZES:
        print(f"{vocab_size} ids: taken for tokens of gpt2, nanoGPT's default (--tokenizer says otherwise)")
        return {"n_vocab": 50257, "tokenizer": "gpt2", "eot": 50256}
    if name is None:
        return {"n_vocab": vocab_size, "tokenizer": "", "eot": vocab_size - 1}
    tokenizer = load_tokenizer(name)
    if tokenizer.n_vocab > vocab_size:
        raise UserError(f"--tokenizer {name} has {tokenizer.n_vocab} ids, the model only {vocab_size}")
    return {"n_vocab": tokenizer.n_vocab, "tokenizer": tokenizer.name, "eot": tokenizer.eot}


@one_line
def main(argv=None):
    """Command line: write a checkpoint folder."""
    parser = Parser(description="Convert nanoGPT's ckpt.pt into a checkpoint folder.")
    parser.add_argument("ckpt", help="nanoGPT's checkpoint file")
    parser.add_argument("out", help="folder to create")
    parser.add_argument(
        "--tokenizer", help="what its data was tokenised with (default: gpt2 for GPT-2's sizes)"
    )
    args = parser.parse_args(argv)
    state, config = read_ckpt(args.ckpt)
    config |= choose_tokenizer(args.tokenizer, config["vocab_size"])
    files = tokenizer_files(GPTConfig(**config))
    with new_folder(args.out) as temporary:
        write_model(temporary, state, config, files)
    print(f"{args.out}: {config['n_layer']} blocks; nanoGPT's GELU is exact, ours is the tanh approximation")


if __name__ == "__main__":
    main()
