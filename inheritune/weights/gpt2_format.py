"""Hugging Face's layout of a GPT-2, which is also ours: reads and writes config.json and model.safetensors.

transformers and lm-eval open a checkpoint folder as it is. Keys that we add to config.json hold what the
layout has no room for: `n_vocab`, `tokenizer` and `bias` (a model without biases stores zeros, which are
dropped when it is read). The files of the hub and those of `save_pretrained` are read. What model.py does not
implement is refused by name.

In this file a configuration is a dict with the fields of model.GPTConfig. A state dict maps full names
(`transformer.h.0.attn.c_attn.weight` …) to tensors, torch's or lazy ones, in Hugging Face's layout (in, out).
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from inheritune.base.errors import UserError
from inheritune.base.files import read_json, sync_folder, write_json
from inheritune.base.tokenizer_identity import tokenizer_name
from inheritune.weights.tensors import LazyTensor, n_bytes, read_tensors, row_chunks, write_tensors

# frozen: checkpoint layout
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# matrices that are stored as (in, out) and that torch's linear layers hold as (out, in)
INPUT_FIRST = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
TIED = {"lm_head.weight": "transformer.wte.weight"}
LIMITS = {"n_layer": 1000, "n_head": 2**16, "n_embd": 2**20, "n_positions": 2**26, "vocab_size": 2**26}
# {pattern of files: how the error "FOLDER has no model.safetensors, …" goes on}
OTHER_FORMATS = {
    "adapter_config.json": "only an adapter: merge it first, by peft's merge_and_unload, and save_pretrained",
    "pytorch_model_fsdp_*": "only FSDP's parts: make one file of them by accelerate merge-weights FOLDER OUT",
    "*.distcp": "only FSDP's parts: make one file of them by accelerate merge-weights FOLDER OUT",
    "zero_to_fp32.py": "only DeepSpeed's parts: in it run python zero_to_fp32.py . OUT --safe_serialization",
    "pytorch_model*.bin*": "only a pickle, which is never opened: save it with transformers' save_pretrained",
    "*.gguf": "only GGUF: open it with transformers' from_pretrained(…, gguf_file=…), then save_pretrained",
    "tf_model*.h5": "only TensorFlow's weights: save it by transformers 4's from_pretrained(…, from_tf=True)",
    "checkpoint-*": "but checkpoints of a Trainer, in folders of their own: give one of these",
}
MAX_FILE = 50 * 10**9  # bytes of one file on the hub; larger models are written in shards
# keys of config.json that a model made from another one keeps
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_EOT = -1  # the `eot` of a model for which no token ends a text


class OtherArchitecture(UserError):
    """A folder holds a model that model.py does not implement, though transformers may."""


def read_model(folder: str) -> tuple[dict[str, LazyTensor], dict]:
    """(state dict, configuration) of a checkpoint folder. Raises UserError unless they fit each other."""
    config = read_config(folder)
    return choose_tensors(stored_tensors(folder), shapes(config), folder), config


def read_config(folder: str) -> dict:
    """The configuration of a checkpoint folder. Raises UserError for what model.py does not implement."""
    path = os.path.join(folder, CONFIG)
    c = read_json(path)
    check_architecture(path, c)
    bias = c.get("bias", True)
    if type(bias) is not bool:
        raise UserError(f"{path}: bias must be true or false")
    sizes = {key: c[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    sizes |= {"block_size": c["n_positions"], "dropout": 0.0, "bias": bias}
    sizes["scale_attn_by_inverse_layer_idx"] = bool(c.get("scale_attn_by_inverse_layer_idx", False))
    return sizes | read_tokenizer_fields(path, c, c["vocab_size"])


def read_tokenizer_fields(path: str, c: dict, vocab_size: int) -> dict:
    """`n_vocab`, `tokenizer` and `eot` of a model, by the content `c` of the config.json at `path` and
    by the tokenizer beside it. Raises UserError."""
    n_vocab, eot = c.get("n_vocab", vocab_size), c.get("eos_token_id")
    eot = eot[0] if isinstance(eot, list) and eot else eot
    tokenizer = c.get("tokenizer") or tokenizer_name(os.path.dirname(path))
    if type(n_vocab) is not int or not 0 < n_vocab <= vocab_size:
        raise UserError(f"{path}: n_vocab {n_vocab!r} is not between 1 and vocab_size {vocab_size}")
    if not isinstance(tokenizer, str):
        raise UserError(f"{path}: tokenizer must be a name")
    # a config.json with a small vocabulary, made by hand, often keeps GPT-2's 50256
    known = type(eot) is int and 0 <= eot < n_vocab
    return {"n_vocab": n_vocab, "tokenizer": tokenizer, "eot": eot if known else NO_EOT}


def read_special_ids(folder: str) -> dict:
    """What config.json says under SPECIAL_IDS: {"eos_token_id": [50256, 50257], "pad_token_id": 50258}."""
    c = read_json(os.path.join(folder, CONFIG))
    return {key: c[key] for key in SPECIAL_IDS if key in c}


def check_architecture(path: str, c: dict) -> None:
    """Raise UserError unless config.json's content `c` is that of a GPT-2 that model.py implements."""
    if c.get("model_type") != "gpt2":
        raise OtherArchitecture(f"{path}: model_type is {c.get('model_type')!r}, not gpt2")
    bad = [
        f"{key} is {c.get(key)!r:.50} (1 to {most:,})"
        for key, most in LIMITS.items()
        if type(c.get(key)) is not int or not 0 < c[key] <= most
    ]
    if not bad and c["n_embd"] % c["n_head"]:
        bad.append(f"n_embd {c['n_embd']} is not a multiple of n_head {c['n_head']}")
    if bad:
        raise UserError(f"{path}: {', '.join(bad)}")
    implemented = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "n_inner": (None, 4 * c["n_embd"]),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
        "scale_attn_weights": (True,),
        "layer_norm_epsilon": (1e-5,),
    }
    refused = [f"{key}={c[key]!r}" for key, known in implemented.items() if key in c and c[key] not in known]
    if refused:
        raise OtherArchitecture(
            f"{path}: {', '.join(refused)} is not implemented here (GPT-2 as released is)"
        )


def config_json(config: dict) -> dict:
    """config.json's content for a configuration: what transformers reads, then the keys that we add."""
    eot = None if config["eot"] == NO_EOT else config["eot"]
    return {  # frozen: checkpoint layout
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config["vocab_size"],
        "n_positions": config["block_size"],
        "n_ctx": config["block_size"],
        "n_embd": config["n_embd"],
        "n_layer": config["n_layer"],
        "n_head": config["n_head"],
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "embd_pdrop": config["dropout"],
        "attn_pdrop": config["dropout"],
        "resid_pdrop": config["dropout"],
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": config["scale_attn_by_inverse_layer_idx"],
        "tie_word_embeddings": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": "float32",
        "bias": config["bias"],
        "n_vocab": config["n_vocab"],
        "tokenizer": config["tokenizer"],
    }


def stored_tensors(folder: str) -> Iterator[tuple[str, LazyTensor]]:
    """Yield (name, tensor) of everything in a folder's safetensors files, by the names that stand there."""
    files, index = [WEIGHTS], os.path.join(folder, INDEX)
    # An index is {tensor name: file name} of a sharded model. save_pretrained writes a whole file beside an
    # old index, which is then out of date.
    if os.path.exists(index) and not os.path.exists(os.path.join(folder, WEIGHTS)):
        shards = read_json(index).get("weight_map")
        files = list(shards.values()) if isinstance(shards, dict) else [None]
        if not all(isinstance(file, str) and re.fullmatch(r"[^/]+\.safetensors", file) for file in files):
            raise UserError(f"{index} has no usable weight_map; fetch the model again")
    for file in sorted(set(files)):
        path = os.path.join(folder, file)
        if not os.path.isfile(path):
            other = other_format(folder) or f"perhaps {OTHER_FORMATS['pytorch_model*.bin*']}"
            raise UserError(f"{folder} has no {file}, {other}")
        yield from read_tensors(path).items()


def other_format(folder: str) -> str:
    """What a folder holds instead of safetensors, and how to convert it; "" if nothing known."""
    for pattern, cure in OTHER_FORMATS.items():
        if glob.glob(os.path.join(glob.escape(folder), pattern)):
            return cure
    return ""


def shapes(config: dict) -> dict[str, tuple]:
    """{full name: shape in Hugging Face's orientation} of all tensors of a checkpoint."""
    C = config["n_embd"]
    layers = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C)}
    layers |= {"ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    every = {"wte.weight": (config["vocab_size"], C), "wpe.weight": (config["block_size"], C)}
    for i in range(config["n_layer"]):
        for name, shape in layers.items():
            every |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    every |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    return {f"transformer.{name}": shape for name, shape in every.items()}


def choose_tensors(
    stored: Iterable[tuple[str, torch.Tensor | LazyTensor]],
    wanted: dict[str, tuple],
    source: str,
    kind: str = "GPT-2",
    prefix: str = "transformer",
    tied: Mapping = TIED,
    ignored: Sequence[str] = (),
) -> dict:
    """The state dict of a model, of what its folder stores. Raises UserError, naming `source`, unless all
    tensors of `wanted`, {name: shape}, are there, and no others.

    prefix: of the names in the base model; one that lacks it gets it.
    tied: {copy: original}: a copy is left out, or becomes the original where only the copy is stored.
    ignored: patterns of the names that are left out.
    """
    tensors = {}
    for name, tensor in stored:
        name = name if name in wanted or f"{prefix}.{name}" not in wanted else f"{prefix}.{name}"
        if name in tensors:
            raise UserError(f"{source} holds {name} twice")
        if name in wanted or not any(re.search(pattern, name) for pattern in ignored):
            tensors[name] = tensor
    for copy, kept in tied.items():
        if copy in tensors and copy not in wanted:
            a = tensors.pop(copy)
            b = tensors.setdefault(kept, a)
            if a.shape != b.shape or not all(map(torch.equal, row_chunks(a), row_chunks(b))):
                raise UserError(f"{source}: {copy} differs from {kept}, though the two are tied")
    wrong = [f"{n} is missing" for n in wanted if n not in tensors]
    wrong += [f"{n} is not a {kind} tensor" for n in tensors if n not in wanted]
    found = {n: tuple(t.shape) for n, t in tensors.items() if n in wanted}
    wrong += [f"{n} is {s}, config.json says {wanted[n]}" for n, s in found.items() if s != wanted[n]]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"{source}: {'; '.join(wrong[:3])}{more}")
    return tensors


def arrange(parameters: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """The state dict of a model's parameters: fp32, on the CPU, with zeros for biases that it lacks."""
    state = {}
    for name, shape in shapes(config).items():
        if name in parameters:
            p = parameters[name].detach().to("cpu", torch.float32)
            state[name] = p.t().contiguous() if name.endswith(INPUT_FIRST) else p.contiguous()
        else:
            state[name] = torch.zeros(shape)
    return state


def write_model(folder: str, state: Mapping, config: dict, files: dict[str, bytes]) -> None:
    """Write a model into a folder that nobody looks for yet: the caller renames it into place.

    state: the tensors of model.safetensors, or of its shards.
    config: the content of config.json.
    files: {name: bytes} of other files; a name may lie in a subfolder.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        state, get_storage_size=n_bytes, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_FILE
    )
    for file, names in split.filename_to_tensors.items():
        write_tensors(os.path.join(folder, file), {name: state[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(os.path.join(folder, INDEX), index)
    write_json(os.path.join(folder, CONFIG), config)
    for name, content in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
    sync_folder(folder)
