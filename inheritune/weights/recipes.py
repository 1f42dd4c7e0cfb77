"""Every initialisation that the paper compares (App. D), as functions on state dicts, and `make_checkpoint`,
which writes what one of them makes.

Inputs are not modified; unchanged tensors are shared, not copied, and no Lazy tensor is read here. State
dicts and configurations are those of gpt2_format.py.
"""

import math
import os
import shutil
from collections.abc import Callable, Mapping

import torch

from inheritune.base.errors import UserError
from inheritune.base.files import read_json, write_json
from inheritune.weights.card import CARD, write_card
from inheritune.weights.checkpoint import LINEAGE, STATE, new_folder, new_lineage
from inheritune.weights.gpt2_format import CONFIG, arrange, open_model, shapes, write_model
from inheritune.weights.tensors import Lazy

RECIPES = ("first", "last", "middle", "alternate", "first_plus_last", "ends")
RECIPES += ("stack", "hybrid", "half_width", "random")
# prefixes of what is taken of a block
PARTS = {"attn": ("ln_1.", "attn."), "mlp": ("ln_2.", "mlp."), "attn+mlp": ("",), "all": ("",)}
WTE = "transformer.wte.weight"
OURS = (CONFIG, STATE, LINEAGE, CARD, "SHA256SUMS")  # never copied; earlier versions wrote SHA256SUMS
WEIGHT_FILES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
WEIGHT_FILES += (".h5", ".msgpack", ".onnx", ".tflite", ".ot")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Model = Callable[[dict], torch.nn.Module]  # makes the GPT of a configuration, with random weights


def make_checkpoint(
    source: str,
    out: str,
    new_model: Model,
    tokenizer_files: dict[str, bytes],
    *,
    layers: int | None = None,
    blocks: list[int] | None = None,
    onto: str | None = None,
    recipe: str = "first",
    parts: str = "all",
    layernorms: bool = True,
    released_slice: bool = False,
    seed: int = 1337,
    **notes,
) -> str:
    """Make a new checkpoint folder `out` out of the checkpoint folder `source`; says in a text what it is.

    With `blocks` it has those blocks; with `onto`, a checkpoint folder, that model's blocks and then the
    source's up to `layers`; otherwise see `initialise`. All files of the source but weights and ours are
    copied; `tokenizer_files` are for a source that has none. notes: kept in lineage.json. Raises UserError.
    """
    weights, config = open_model(source)
    if onto:
        small, small_config = open_model(onto)
        state, new_config = grow_onto(small, small_config, weights, config, layers)
        lineage = new_lineage(source, list(range(layers)), onto, small_config["n_layer"], **notes)
    elif blocks:
        state, new_config = inherit(weights, config, blocks)
        lineage = new_lineage(source, blocks)
    else:
        how = {"recipe": recipe, "parts": parts, "layernorms": layernorms, "released_slice": released_slice}
        how["seed"] = seed
        state, new_config, blocks = initialise(weights, config, new_model, layers or config["n_layer"], **how)
        lineage = new_lineage(source, blocks, **how, **notes)
    theirs = read_json(os.path.join(source, CONFIG))
    ids = {key: theirs[key] for key in SPECIAL_IDS if key in theirs}
    with new_folder(out) as temporary:
        write_model(temporary, state, new_config, tokenizer_files, ids)
        copy_others(source, temporary)
        write_json(os.path.join(temporary, LINEAGE), lineage)
        write_card(temporary, os.path.basename(os.path.normpath(out)), source)
    total = sum(math.prod(t.shape) for t in state.values())
    return f"{out}: {new_config['n_layer']} of {config['n_layer']} blocks, {total:,} values"


def copy_others(source: str, folder: str) -> None:
    """Copy and fsync what a checkpoint folder holds besides weights and our files: tokenizer, chat template,
    …. Hidden files and folders are left out."""
    for name in sorted(os.listdir(source)):
        path = os.path.join(source, name)
        if name in OURS or name.endswith(WEIGHT_FILES) or name.startswith(".") or not os.path.isfile(path):
            continue
        with open(path, "rb") as theirs, open(os.path.join(folder, name), "wb") as ours:
            shutil.copyfileobj(theirs, ours)
            ours.flush()
            os.fsync(ours.fileno())


def initialise(
    state: Mapping,
    config: dict,
    new_model: Model,
    k: int,
    recipe: str = "first",
    parts: str = "all",
    layernorms: bool = True,
    released_slice: bool = False,
    seed: int = 0,
) -> tuple[dict, dict, list[int]]:
    """(state, config, blocks) of a new model with k blocks made by `recipe` out of the given one.

    parts: what is taken of each block, attention or MLP with the LayerNorm before it, or both;
    layernorms=False leaves the blocks' LayerNorms out; released_slice leaves wpe and ln_f out, as the
    authors' script does. What is left out is random, from `seed`. blocks: the source block of each new one,
    [] for random. Raises UserError.
    """
    if recipe == "random":
        small = config | {"n_layer": k}
        return random_state(small, new_model, seed), small, []
    blocks = choose_blocks(recipe, config["n_layer"], k)
    state, small = inherit(state, config, blocks)
    if recipe == "half_width":
        state, small = halve(state, small)

    def kept(name):
        if not name.startswith("transformer.h."):
            return name == WTE or not released_slice
        inside = name.split(".", 3)[3]  # ln_1.weight, attn.c_attn.weight, …
        return inside.startswith(PARTS[parts]) and (layernorms or not inside.startswith("ln_"))

    if not all(map(kept, state)):
        random = random_state(small, new_model, seed)
        state = {name: tensor if kept(name) else random[name] for name, tensor in state.items()}
    return state, small, blocks


def random_state(config: dict, new_model: Model, seed: int) -> dict[str, torch.Tensor]:
    """The state dict (fp32) of a new model, the same for the same seed; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return arrange(dict(new_model(config).named_parameters()), config)


def choose_blocks(recipe: str, n_layer: int, k: int) -> list[int]:
    """The source blocks that become blocks 0 … k-1, for every recipe but random (paper, App. D).

    Raises UserError when the recipe cannot make k blocks out of n_layer.
    """
    if recipe == "half_width" and k != n_layer:
        raise UserError(f"half_width keeps all {n_layer} blocks: leave --layers out")
    if recipe == "stack" and k != 2 * n_layer:
        raise UserError(
            f"stack doubles the model: --layers must be {2 * n_layer}, twice its {n_layer} blocks, not {k}"
        )
    if recipe == "hybrid" and k % 2:
        raise UserError(f"hybrid repeats the first k/2 blocks twice: --layers must be even, not {k}")
    if recipe != "stack" and k > n_layer:
        raise UserError(f"--layers {k} is more than the {n_layer} blocks of the model")
    middle = (n_layer - k) // 2
    every_second = list(range(0, n_layer, 2))[:k]
    more = k - len(every_second)  # DistilBERT's start of 16 out of 24 goes on with 18 … 21
    next_ones = max(0, n_layer - 2 - more)
    return {
        "first": [*range(k)],
        "last": [*range(n_layer - k, n_layer)],
        "middle": [*range(middle, middle + k)],
        "alternate": [*every_second, *range(next_ones, next_ones + more)],
        "first_plus_last": [*range(k - 1), n_layer - 1],
        "ends": [*range(k - k // 2), *range(n_layer - k // 2, n_layer)],
        "stack": [*range(n_layer), *range(n_layer)],
        "hybrid": [*range(k // 2), *range(k // 2)],
        "half_width": [*range(n_layer)],
    }[recipe]


def inherit(state: Mapping, config: dict, blocks: list[int]) -> tuple[dict, dict]:
    """(state, config) of the model with only these blocks (repeats allowed) of the given one (paper,
    Algorithm 1).

    Raises UserError when a block is not there.
    """
    check_blocks(blocks, config["n_layer"])
    scaled = config["scale_attn_by_inverse_layer_idx"]
    return assemble(state, [(state, i) for i in blocks], scaled), config | {"n_layer": len(blocks)}


def check_blocks(blocks: list[int], n: int) -> None:
    """Raise UserError unless a model of n blocks has these, and they are not none."""
    missing = [i for i in blocks if not 0 <= i < n]
    if not blocks or missing:
        what = f"block {missing[0]}" if missing else "at least one block"
        raise UserError(f"asked for {what}, but the model has blocks 0 to {n - 1} ({n} layers)")


def grow_onto(small: Mapping, small_config: dict, state: Mapping, config: dict, k: int) -> tuple[dict, dict]:
    """(state, config) of the trained small model with the reference's next blocks on top, up to k in all.

    Embeddings and final LayerNorm are the small model's. Raises UserError when the two do not fit together.
    """
    n, most = small_config["n_layer"], config["n_layer"]
    if n >= most:
        raise UserError(f"there is nothing to add: the small model has {n} blocks, the reference {most}")
    if not n < k <= most:
        raise UserError(f"layers must be between {n + 1} and {most} to grow {n} blocks onto, not {k}")
    for key in ("n_embd", "n_head", "block_size", "vocab_size", "bias", "scale_attn_by_inverse_layer_idx"):
        here, there = small_config[key], config[key]
        if here != there:
            raise UserError(f"cannot grow: {key} is {here} in the small model and {there} in the reference")
    blocks = [(small, i) for i in range(n)] + [(state, i) for i in range(n, k)]
    return assemble(small, blocks, config["scale_attn_by_inverse_layer_idx"]), small_config | {"n_layer": k}


def assemble(base: Mapping, blocks: list[tuple[Mapping, int]], scaled: bool, prefix="transformer.h.") -> dict:
    """A new state dict: all of `base` outside its blocks, whose names begin with `prefix` and a number, and
    for each (state, number) of `blocks` that block.

    scaled: blocks divide their attention logits by (block number + 1) (scale_attn_by_inverse_layer_idx). A
    block that changes its number then takes the quotient into its queries, and computes what it did.
    """
    new = {name: base[name] for name in base if not name.startswith(prefix)}
    for i, (state, number) in enumerate(blocks):
        old, here = f"{prefix}{number}.", f"{prefix}{i}."
        for name in state:
            if name.startswith(old):
                moved = scaled and i != number and ".attn.c_attn." in name
                tensor = scale_queries(state[name], (i + 1) / (number + 1)) if moved else state[name]
                new[here + name[len(old) :]] = tensor
    return new


def scale_queries(tensor: torch.Tensor | Lazy, factor: float) -> Lazy:
    """c_attn's weight (C, 3C) or bias (3C,) with its queries, the first third of the columns, times
    `factor`."""

    def rows(a, b):
        values = tensor[a:b] if len(tensor.shape) == 2 else tensor[:]
        q, k, v = values.double().tensor_split(3, dim=-1)
        values = torch.cat((q * factor, k, v), dim=-1).to(tensor.dtype)
        return values if len(tensor.shape) == 2 else values[a:b]

    return Lazy(tensor.shape, tensor.dtype, rows)


def halve(state: Mapping, config: dict) -> tuple[dict, dict]:
    """(state, config) at half width: the first floor(n_head / 2) heads, as many channels as they have, MLP 4
    × that.

    The paper does not say which channels of embeddings and LayerNorms it keeps; the first ones go with the
    first heads. Raises UserError for a single head.
    """
    n_head = config["n_head"] // 2
    if not n_head:
        raise UserError("half_width needs at least two heads")
    C, c = config["n_embd"], n_head * (config["n_embd"] // config["n_head"])

    def columns(name, rows):
        if ".c_attn." in name:  # q, k and v side by side: the first c columns of each
            return rows.unflatten(-1, (3, C))[..., :c].flatten(-2)
        return rows[..., : 4 * c if ".c_fc." in name else c].contiguous()

    def cut(name, tensor, shape):
        if len(shape) == 1:  # its rows are columns
            return Lazy(shape, tensor.dtype, lambda a, b: columns(name, tensor[:])[a:b])
        return Lazy(shape, tensor.dtype, lambda a, b: columns(name, tensor[a:b]))

    small = config | {"n_head": n_head, "n_embd": c}
    return {name: cut(name, state[name], shape) for name, shape in shapes(small).items()}, small
