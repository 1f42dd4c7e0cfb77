"""Every initialisation that the paper compares, as pure functions on state dicts.

A state dict maps canonical names (`transformer.h.0.attn.c_attn.weight` …) to tensors in Hugging Face's orientation
(in, out), torch's or Lazy (tensors.py). Arguments are only read; what is kept unchanged is the same tensor, in its
dtype, and no Lazy tensor is read here. Nothing here knows of files: inherit.py is the command.
"""

import torch

from inheritune.base.errors import UserError
from inheritune.weights import gpt2_format
from inheritune.weights.tensors import Lazy

RECIPES = (
    "first",
    "last",
    "middle",
    "alternate",
    "first_plus_last",
    "ends",
    "stack",
    "hybrid",
    "half_width",
    "random",
)
PARTS = {
    "attn": ("ln_1.", "attn."),
    "mlp": ("ln_2.", "mlp."),
    "attn+mlp": ("",),
    "all": ("",),
}  # prefixes in a block
WTE = "transformer.wte.weight"


def assemble(base, blocks, scaled):
    """A new state dict: all of `base` outside its blocks, and for each (state, number) of `blocks` that block.

    scaled: blocks divide their attention logits by (block number + 1) (scale_attn_by_inverse_layer_idx). A block that
    changes its number then takes the quotient into its queries, and computes what it did.
    """
    new = {name: base[name] for name in base if not name.startswith("transformer.h.")}
    for i, (state, number) in enumerate(blocks):
        old, here = f"transformer.h.{number}.", f"transformer.h.{i}."
        for name in state:
            if name.startswith(old):
                moved = scaled and i != number and ".attn.c_attn." in name
                new[here + name[len(old) :]] = (
                    scale_queries(state[name], (i + 1) / (number + 1)) if moved else state[name]
                )
    return new


def scale_queries(tensor, factor):
    """c_attn's weight (C, 3C) or bias (3C,), Lazy, with its queries, the first third of the columns, times `factor`."""

    def rows(a, b):
        values = tensor[a:b] if len(tensor.shape) == 2 else tensor[:]
        q, k, v = values.double().tensor_split(3, dim=-1)
        values = torch.cat((q * factor, k, v), dim=-1).to(tensor.dtype)
        return values if len(tensor.shape) == 2 else values[a:b]

    return Lazy(tensor.shape, tensor.dtype, rows)


def inherit(state, config, blocks):
    """(state, config) of the model with only these blocks (a list of numbers, repeats allowed) of the given one.

    Raises UserError when a block is not there.
    """
    missing = [i for i in blocks if not 0 <= i < config["n_layer"]]
    if not blocks or missing:
        what = f"block {missing[0]}" if missing else "at least one block"
        n = config["n_layer"]
        raise UserError(f"asked for {what}, but the model has blocks 0 to {n - 1} ({n} layers)")
    scaled = config["scale_attn_by_inverse_layer_idx"]
    return assemble(state, [(state, i) for i in blocks], scaled), config | {"n_layer": len(blocks)}


def grow_onto(small, small_config, state, config, k):
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


def choose_blocks(recipe, n_layer, k):
    """The source blocks (a list of numbers) that become blocks 0 … k-1, for every recipe but random (paper, App. D).

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
    every_second = list(range(0, n_layer, 2))[:k]
    more = k - len(every_second)  # DistilBERT's start of 16 out of 24 goes on with 18 … 21
    return {
        "first": list(range(k)),
        "last": list(range(n_layer - k, n_layer)),
        "middle": list(range((n_layer - k) // 2, (n_layer - k) // 2 + k)),
        "alternate": every_second
        + list(range(max(0, n_layer - 2 - more), max(0, n_layer - 2 - more) + more)),
        "first_plus_last": [*range(k - 1), n_layer - 1],
        "ends": [*range(k - k // 2), *range(n_layer - k // 2, n_layer)],
        "stack": list(range(n_layer)) * 2,
        "hybrid": list(range(k // 2)) * 2,
        "half_width": list(range(n_layer)),
    }[recipe]


def halve(state, config):
    """(state, config) at half width: the first floor(n_head / 2) heads, as many channels as they have, MLP 4 × that.
    All its tensors are Lazy.

    The paper does not say which channels of embeddings and LayerNorms it keeps; the first ones go with the first heads.
    Raises UserError for a single head.
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
        if len(shape) == 1:  # whose columns are its rows
            return Lazy(shape, tensor.dtype, lambda a, b: columns(name, tensor[:])[a:b])
        return Lazy(shape, tensor.dtype, lambda a, b: columns(name, tensor[a:b]))

    small = config | {"n_head": n_head, "n_embd": c}
    shapes = gpt2_format.shapes(small)
    return {name: cut(name, state[name], shapes[name]) for name in state}, small


def initialise(state, config, recipe, k, fresh, parts="all", layernorms=True, released_slice=False):
    """(state, config, blocks) of a new model with k blocks made by `recipe` out of the given one.

    parts: what is taken of each block, attention or MLP with the LayerNorm before it, or both; layernorms=False leaves
    the blocks' LayerNorms out; released_slice leaves wpe and ln_f out, as the authors' script does. What is left out
    comes from fresh(config), which makes a whole random state dict. blocks: the source block of each new one, [] for
    random. Raises UserError.
    """
    if recipe == "random":
        small = config | {"n_layer": k}
        return fresh(small), small, []
    blocks = choose_blocks(recipe, config["n_layer"], k)
    state, small = inherit(state, config, blocks)
    if recipe == "half_width":
        state, small = halve(state, small)

    def kept(name):
        if not name.startswith("transformer.h."):
            return name == WTE or not released_slice
        inside = name.split(".", 3)[3]  # ln_1.weight, attn.c_attn.weight, …
        return inside.startswith(PARTS[parts]) and (layernorms or not inside.startswith("ln_"))

    dropped = [name for name in state if not kept(name)]
    if dropped:
        random = fresh(small)
        state = {name: random[name] if name in set(dropped) else tensor for name, tensor in state.items()}
    return state, small, blocks
