"""Convert nanoGPT's `ckpt.pt` into a checkpoint folder, once.

    python tools/convert_nanogpt.py out/ckpt.pt out-converted

This is the only pickle that the repository opens. torch's restricted unpickler makes tensors and plain values
of it and calls nothing else. nanoGPT's GELU is the exact one, ours is GPT-2's tanh approximation: the same
weights give very slightly different losses. The paper's training script, a fork of nanoGPT, says in
model_args how its attention is scaled; build-nanogpt keeps its model's config object instead of model_args.
"""

import os
import re
import sys
import zipfile

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # run from anywhere

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.base.files import new_folder
from inheritune.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from inheritune.weights import gpt2_format
from inheritune.weights.tensors import MASKS, check_finite
from model import GPTConfig

GPT2_SIZES = (50257, 50304)  # GPT-2's vocabulary, and padded as nanoGPT does
LLM_C = (20240326, 20240327)  # the first word of llm.c's model and state files


def read_ckpt(path: str) -> tuple[dict, dict]:
    """(state dict, configuration without a tokenizer) of a nanoGPT checkpoint."""
    saved = unpickle(path)
    try:
        saved = dict(saved)
        args = saved["model_args"] if "model_args" in saved else vars(saved["config"])
        args, state = dict(args), dict(saved["model"])
        config = {key: args.pop(key) for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    except (TypeError, ValueError, KeyError, AttributeError):
        raise UserError(f"{path} lacks nanoGPT's model_args or model") from None
    config |= {"dropout": 0.0, "bias": bool(args.pop("bias", True))}  # early versions always had biases
    config["scale_attn_by_inverse_layer_idx"] = bool(args.pop("scale_attn_by_inverse_layer_idx", False))
    args.pop("dropout", None)
    if args:
        unknown = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise UserError(f"{path}: this model has {unknown:.200}, which is not implemented here")
    config |= {"n_vocab": config["vocab_size"], "tokenizer": "", "eot": gpt2_format.NO_EOT}
    gpt2_format.check_architecture(path, gpt2_format.config_json(config))
    tensors = canonical(path, state, config)
    return gpt2_format.choose_tensors(tensors.items(), gpt2_format.shapes(config), path), config


class GPTConfigOfScript:
    """What the restricted unpickler makes of build-nanogpt's GPTConfig, a dataclass of the script's own."""


def unpickle(path: str):
    """What torch.save wrote, of tensors, numpy's numbers and plain values. Raises UserError for anything
    else."""
    with open(path, "rb") as f:
        head = f.read(256 * 4)
    if not zipfile.is_zipfile(path):
        what = "not a file that torch.save wrote, or cut off"
        if len(head) == 1024 and int.from_bytes(head[:4], "little") in LLM_C:
            what = "llm.c's; export it by llm.c's dev/eval/export_hf.py"
        elif head[:2] == b"\x80\x02":
            what = "torch.save's form before torch 1.6: open and save it once more by a newer torch"
        raise UserError(f"{path} is no nanoGPT checkpoint: {what}")
    # of numpy: best_val_loss; of scripts: their config
    numbers = [np.dtype, np._core.multiarray.scalar, *(type(np.dtype(name)) for name in ("f4", "f8", "i8"))]
    scripts = [(GPTConfigOfScript, f"{module}.GPTConfig") for module in ("__main__", "model", "train_gpt2")]
    try:
        with torch.serialization.safe_globals([*numbers, *scripts]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # whatever a damaged or hostile pickle makes the reader do
        problem = f"is no whole nanoGPT checkpoint of tensors and plain values ({type(e).__name__})"
        raise UserError(f"{path} {problem}") from None


def canonical(path: str, state: dict, config: dict) -> dict[str, torch.Tensor]:
    """A nanoGPT state dict in the layout of gpt2_format.py: without causal masks and the prefixes that DDP
    and torch.compile give to names, transposed where Hugging Face's are, with zeros for the biases it
    lacks."""
    shapes = {} if config["bias"] else gpt2_format.shapes(config)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items() if name.endswith("bias")}
    for key, tensor in state.items():
        name = re.sub(r"^((module|_orig_mod)\.)+", "", str(key))
        if MASKS.search(name):
            continue
        strided = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not strided or not tensor.is_floating_point():
            raise UserError(f"{path}: {name:.80} is not a tensor of floating-point numbers")
        turned = name.endswith(gpt2_format.INPUT_FIRST) and tensor.dim() == 2
        tensors[name] = check_finite(tensor.t() if turned else tensor, name, path).detach().contiguous()
    return tensors


def choose_tokenizer(tokenizer: Tokenizer | None, vocab_size: int) -> dict:
    """The configuration's n_vocab, tokenizer and eot.

    nanoGPT's checkpoints do not say how their data was tokenised. Without --tokenizer,
    GPT-2's sizes are taken for GPT-2's tokenizer, and a line says so.
    """
    if tokenizer is None and vocab_size in GPT2_SIZES:
        print(f"{vocab_size} ids: taken for tokens of gpt2, nanoGPT's default (--tokenizer says otherwise)")
        return {"n_vocab": 50257, "tokenizer": "gpt2", "eot": 50256}
    if tokenizer is None:
        return {"n_vocab": vocab_size, "tokenizer": "", "eot": gpt2_format.NO_EOT}
    if tokenizer.n_vocab > vocab_size:
        raise UserError(
            f"--tokenizer {tokenizer.name} has {tokenizer.n_vocab} ids, the model only {vocab_size}"
        )
    return {"n_vocab": tokenizer.n_vocab, "tokenizer": tokenizer.name, "eot": tokenizer.eot}


@one_line
def main(argv=None):
    """Command line: write a checkpoint folder."""
    parser = Parser(description="Convert nanoGPT's ckpt.pt into a checkpoint folder.")
    parser.add_argument("ckpt", help="nanoGPT's checkpoint file")
    parser.add_argument("out", help="folder to create")
    parser.add_argument("--tokenizer", help="of its data (default: gpt2 for GPT-2's sizes)")
    args = parser.parse_args(argv)
    state, config = read_ckpt(args.ckpt)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    config |= choose_tokenizer(tokenizer, config["vocab_size"])
    files = (tokenizer and tokenizer.files) or tokenizer_files(GPTConfig(**config))
    with new_folder(args.out) as temporary:
        gpt2_format.write_model(temporary, state, gpt2_format.config_json(config), files)
    gelu = "a GELU that was exact, as nanoGPT's own is, is now the tanh approximation"
    print(f"{args.out}: {config['n_layer']} blocks; {gelu}")


if __name__ == "__main__":
    main()
