"""Every initialisation that the paper compares (App. D), as functions on state dicts, and `make_checkpoint`,
which writes what one of them makes.

Inputs are not modified; unchanged tensors are shared, not copied, and no Lazy tensor is read here. State
dicts and configurations are those of gpt2_format.py.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping

import torch

from inheritune.base.errors import UserError
from inheritune.base.files import new_folder, read_json, write_json
from inheritune.weights.checkpoint import LINEAGE, STATE, new_lineage
from inheritune.weights.gpt2_format import CONFIG, arrange, config_json, open_model, shapes, write_model
from inheritune.weights.model_card import CARD, write_card
from inheritune.weights.tensors import Lazy

RECIPES = ("first", "last", "middle", "alternate", "first_plus_last", "ends")
RECIPES += ("stack", "hybrid", "half_width", "random")
# prefixes of what is taken of a block
PARTS = {"attn": ("ln_1.", "attn."), "mlp": ("ln_2.", "mlp."), "attn+mlp": ("",), "all": ("",)}
WTE = "transformer.wte.weight"
OURS = (CONFIG, STATE, LINEAGE, CARD, "SHA256SUMS")  # never copied; earlier versions wrote SHA256SUMS
# nor are hidden files and weights
LEFT = re.compile(r"\..*|.*\.(safetensors|index\.json|bin|pth?|ckpt|gguf|h5|msgpack|onnx|tflite|ot)")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Model = Callable[[dict], torch.nn.Module]  # makes the GPT of a configuration, with random weights


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to make a model out of the blocks of another."""

    recipe: str = "first"  # which blocks: see RECIPES
    parts: str = "all"  # of each block: attention or MLP with the LayerNorm before it, or both
    layernorms: bool = True  # take the blocks' LayerNorms too
    released_slice: bool = False  # take neither wpe nor ln_f, as the authors' script does
    seed: int = 1337  # of what is random


def make_checkpoint(
    source: str,
    out: str,
    new_model: Model,
    tokenizer_files: dict[str, bytes],
    layers: int | None = None,
    blocks: list[int] | None = None,
    onto: str | None = None,
    notes: dict | None = None,
    **how,
) -> str:
    """Make a new checkpoint folder `out` out of the checkpoint folder `source`; says in a text what it is.

    With `blocks` it has those blocks; with `onto`, a checkpoint folder, that model's blocks and then the
    source's up to `layers`; otherwise `layers` blocks by the recipe. how: fields of a Recipe.
    `tokenizer_files` are for a source that has none. notes: kept in lineage.json.
    """
    weights, config = open_model(source)
    notes = notes or {}
    if onto:
        small, small_config = open_model(onto)
        state, new_config = grow_onto(small, small_config, weights, config, layers)
        lineage = new_lineage(source, list(range(layers)), onto, small_config["n_layer"], **notes)
    else:
        recipe, k = Recipe(**how), layers or config["n_layer"]
        state, new_config, blocks = initialise(weights, config, new_model, k, recipe, blocks)
        lineage = new_lineage(source, blocks, **vars(recipe), **notes)
    theirs = read_json(os.path.join(source, CONFIG))
    content = config_json(new_config) | {key: theirs[key] for key in SPECIAL_IDS if key in theirs}
    size = write_inherited(source, out, state, content, tokenizer_files, lineage)
    return f"{out}: {new_config['n_layer']} of {config['n_layer']} blocks, {size}"


def write_inherited(source: str, out: str, state: Mapping, config: dict, files: dict, lineage: dict) -> str:
    """Write a new checkpoint folder with all files of the source but weights and ours: tokenizer, chat
    template, …, where `files` are for a source that has none. Returns its size in words."""
    for name in sorted(os.listdir(source)):
        path = os.path.join(source, name)
        if os.path.isfile(path) and name not in OURS and not LEFT.fullmatch(name):
            with open(path, "rb") as f:
                files = files | {name: f.read()}
    with new_folder(out) as temporary:
        write_model(temporary, state, config, files)
        write_json(os.path.join(temporary, LINEAGE), lineage)
        write_card(temporary, os.path.basename(os.path.normpath(out)), source)
    return f"{sum(math.prod(t.shape) for t in state.values()):,} values"


def initialise(state: Mapping, config: dict, new_model: Model, k: int, how: Recipe, blocks=None) -> tuple:
    """(state, config, blocks) of a model with k blocks, or with these `blocks`, made out of the given one.
    What is not taken of it is random. blocks: the source block of each new one, [] for random."""
    if how.recipe == "random":
        small = config | {"n_layer": k}
        return random_state(small, new_model, how.seed), small, []
    blocks = blocks or choose_blocks(how.recipe, config["n_layer"], k)
    state, small = inherit(state, config, blocks)
    if how.recipe == "half_width":
        state, small = halve(state, small)

    def kept(name):
        if not name.startswith("transformer.h."):
            return name == WTE or not how.released_slice
        inside = name.split(".", 3)[3]  # ln_1.weight, attn.c_attn.weight, …
        return inside.startswith(PARTS[how.parts]) and (how.layernorms or not inside.startswith("ln_"))

    if not all(map(kept, state)):
        random = random_state(small, new_model, how.seed)
        state = {name: tensor if kept(name) else random[name] for name, tensor in state.items()}
    return state, small, blocks


def random_state(config: dict, new_model: Model, seed: int) -> dict[str, torch.Tensor]:
    """The state dict (fp32) of a new model, the same for the same seed; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return arrange(dict(new_model(config).named_parameters()), config)


def choose_blocks(recipe: str, n_layer: int, k: int) -> list[int]:
    """The source blocks that become blocks 0 … k-1, for every recipe but random (paper, App. D)."""
    if recipe == "half_width" and k != n_layer:
        raise UserError(f"half_width keeps all {n_layer} blocks: leave --layers out")
    if recipe == "stack" and k != 2 * n_layer:
        wanted = f"{2 * n_layer}, twice its {n_layer} blocks, not {k}"
        raise UserError(f"stack doubles the model: --layers must be {wanted}")
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
    """(state, config) of the model with these blocks of the given one, repeats allowed (paper, Alg. 1)."""
    check_blocks(blocks, config["n_layer"])
    new = assemble(state, [(state, i) for i in blocks], config["scale_attn_by_inverse_layer_idx"])
    return new, config | {"n_layer": len(blocks)}


def check_blocks(blocks: list[int], n: int) -> None:
    """Raise UserError unless a model of n blocks has these, and they are not none."""
    missing = [i for i in blocks if not 0 <= i < n]
    if not blocks or missing:
        what = f"block {missing[0]}" if missing else "at least one block"
        raise UserError(f"asked for {what}, but the model has blocks 0 to {n - 1} ({n} layers)")


def grow_onto(small: Mapping, small_config: dict, state: Mapping, config: dict, k: int) -> tuple[dict, dict]:
    """(state, config) of the trained small model with the reference's next blocks on top, up to k in all.
    Embeddings and final LayerNorm are the small model's."""
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
    """c_attn's weight (C, 3C) or bias (3C,) with its queries, the first C columns, times `factor`."""

    def scaled(values):
        q, k, v = values.double().tensor_split(3, dim=-1)
        return torch.cat((q * factor, k, v), dim=-1).to(tensor.dtype)

    return by_columns(tensor, tensor.shape, scaled)


def by_columns(tensor: torch.Tensor | Lazy, shape: tuple, change: Callable) -> Lazy:
    """The Lazy tensor whose rows are change(rows of `tensor`); a vector counts as one row."""
    if len(shape) == 1:
        return Lazy(shape, tensor.dtype, lambda a, b: change(tensor[:])[a:b])
    return Lazy(shape, tensor.dtype, lambda a, b: change(tensor[a:b]))


def halve(state: Mapping, config: dict) -> tuple[dict, dict]:
    """(state, config) at half width: the first floor(n_head / 2) heads, as many channels as they have, MLP 4
    × that. The paper does not say which channels of embeddings and LayerNorms it keeps; the first ones go
    with the first heads."""
    n_head = config["n_head"] // 2
    if not n_head:
        raise UserError("half_width needs at least two heads")
    C, c = config["n_embd"], n_head * (config["n_embd"] // config["n_head"])

    def columns(name, rows):
        if ".c_attn." in name:  # q, k and v side by side: the first c columns of each
            return rows.unflatten(-1, (3, C))[..., :c].flatten(-2)
        return rows[..., : 4 * c if ".c_fc." in name else c].contiguous()

    small, new = config | {"n_head": n_head, "n_embd": c}, {}
    for name, shape in shapes(small).items():
        new[name] = by_columns(state[name], shape, functools.partial(columns, name))
    return new, small
