"""Every initialisation that the paper compares (App. D), and `make_checkpoint`, which writes one as a folder.

A new model takes blocks of a trained one, its reference. Each recipe is a line of BLOCKS. What the new model
does not take from the reference is random. State dicts are not modified. Unchanged tensors are shared,
and read from disk while they are written.
"""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping

import torch

from inheritune.base.errors import UserError
from inheritune.base.files import new_folder, write_json
from inheritune.data.tokenizer import tokenizer_files
from inheritune.models.blocks import check_blocks
from inheritune.models.open_model import Config, model_class, open_config, open_weights
from inheritune.weights.checkpoint import LINEAGE, files_beside, new_lineage
from inheritune.weights.gpt2_format import SPECIAL_IDS, read_special_ids, shapes, write_model
from inheritune.weights.model_card import write_card
from inheritune.weights.tensors import LazyTensor, n_bytes


def alternate(n: int, k: int) -> list[int]:
    """Every second block. If k is more than these, go on as the paper's DistilBERT-style baseline does: of 24
    blocks, 16 are 0, 2, …, 22 and then 18 to 21."""
    even = list(range(0, n, 2))[:k]
    rest = k - len(even)
    start = max(0, n - 2 - rest)
    return [*even, *range(start, start + rest)]


# {recipe: the blocks that become blocks 0 … k-1, of a reference with n blocks}
BLOCKS: dict[str, Callable[[int, int], list[int]]] = {
    "first": lambda n, k: [*range(k)],
    "last": lambda n, k: [*range(n - k, n)],
    "middle": lambda n, k: [*range((n - k) // 2, (n - k) // 2 + k)],
    "alternate": alternate,
    "first_plus_last": lambda n, k: [*range(k - 1), n - 1],
    "ends": lambda n, k: [*range(k - k // 2), *range(n - k // 2, n)],
    "stack": lambda n, k: [*range(n), *range(n)],
    "hybrid": lambda n, k: [*range(k // 2), *range(k // 2)],
    "half_width": lambda n, k: [*range(n)],
    "random": lambda n, k: [],
}
RECIPES = tuple(BLOCKS)
# {part: prefixes of its tensors' names inside a block}; attn+mlp is the paper's name for all
PARTS = {"attn": ("ln_1.", "attn."), "mlp": ("ln_2.", "mlp."), "attn+mlp": ("",), "all": ("",)}
WTE = "transformer.wte.weight"
# keys of config.json that may differ between models that exchange blocks
EXCHANGEABLE = ("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache")
EXCHANGEABLE += ("n_vocab", "tokenizer", "auto_map", *SPECIAL_IDS)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to make a model out of the blocks of another."""

    recipe: str = "first"  # which blocks: see BLOCKS
    parts: str = "all"  # of each block: attention or MLP with the LayerNorm before it, or both
    layernorms: bool = True  # take the blocks' LayerNorms too
    released_slice: bool = False  # take neither positions nor final LayerNorm, as the authors' script does
    seed: int = 1337  # of what is random


def make_checkpoint(
    source: str,
    out: str,
    layers: int | None = None,
    blocks: list[int] | None = None,
    onto: str | None = None,
    notes: dict | None = None,
    **options,
) -> str:
    """Make the new checkpoint folder `out`. Returns a line that says what it is.

    source: the folder of the reference.
    layers: the new depth; None is the reference's.
    blocks: the source block of each new one, in place of those that the recipe chooses.
    onto: the folder of a trained small model: its blocks come first, then the reference's up to `layers`.
    notes: what lineage.json says besides.
    options: fields of a Recipe.
    """
    recipe, config = Recipe(**options), open_config(source)
    weights = None if recipe.recipe == "random" else open_weights(source, config)
    if onto:
        small = open_config(onto)
        state, new = grow_onto(open_weights(onto, small), small, weights, config, layers)
        lineage = new_lineage(source, list(range(layers)), onto, small.n_layer, new.warning)
    else:
        state, new, blocks = initialise(weights, config, recipe, layers or config.n_layer, blocks)
        lineage = new_lineage(source, blocks, warning=new.warning, **vars(recipe))
    if recipe.recipe == "random":
        lineage["embeddings_and_ln_f"] = "random"
    lineage |= notes or {}

    sizes = Counter()  # bytes of each dtype: single tensors may be in fp32, such as those of routers
    for tensor in state.values():
        sizes[tensor.dtype] += n_bytes(tensor)
    content = new.content(max(sizes, key=sizes.get)) | read_special_ids(source)
    files = tokenizer_files(config, source) | files_beside(source)
    with new_folder(out) as temporary:
        write_model(temporary, state, content, files)
        write_json(os.path.join(temporary, LINEAGE), lineage)
        write_card(temporary, os.path.basename(os.path.normpath(out)), source)
    values = sum(math.prod(tensor.shape) for tensor in state.values())
    warning = f"\n{new.warning}" if new.warning else ""
    of = "random" if recipe.recipe == "random" else f"of {config.n_layer}"
    return f"{out}: {new.n_layer} {of} blocks, {values:,} values{warning}"


def initialise(
    state: Mapping | None, config: Config, recipe: Recipe, k: int, blocks: list[int] | None = None
) -> tuple[dict, Config, list[int]]:
    """(state dict, configuration, source block of each new one) of a model with k blocks, or with `blocks`.

    state, config: the reference's; the recipe `random` needs no state dict.
    """
    check_fits(recipe, config)
    if recipe.recipe == "random":
        new = config.with_blocks(list(range(k)))
        return random_weights(new, recipe.seed), new, []
    blocks = blocks or choose_blocks(recipe.recipe, config.n_layer, k)
    state, new = inherit(state, config, blocks)
    if recipe.recipe == "half_width":
        state, new = halve(state, new)
    taken = {name for name in state if is_taken(name, config.block_prefix, recipe)}
    if len(taken) < len(state):
        random = random_weights(new, recipe.seed)
        state = {name: tensor if name in taken else random[name] for name, tensor in state.items()}
    return state, new, blocks


def check_fits(recipe: Recipe, config: Config) -> None:
    """Raise UserError if a recipe takes parts of blocks and the model has none that we know."""
    flags = {
        "--recipe half_width": recipe.recipe == "half_width",
        "--parts": recipe.parts != "all",
        "--layernorms": not recipe.layernorms,
        "--released_slice": recipe.released_slice,
    }
    wrong = [flag for flag, is_set in flags.items() if is_set]
    if wrong and not config.has_parts:
        raise UserError(f"only whole blocks can be taken of this model: leave out {', '.join(wrong)}")


def is_taken(name: str, prefix: str, recipe: Recipe) -> bool:
    """Whether a tensor comes from the reference, not from the random initialisation."""
    if not name.startswith(prefix):
        return name == WTE or not recipe.released_slice
    inside = name.removeprefix(prefix).partition(".")[2]  # ln_1.weight, attn.c_attn.weight, …
    return inside.startswith(PARTS[recipe.parts]) and (recipe.layernorms or not inside.startswith("ln_"))


def random_weights(config: Config, seed: int) -> dict[str, torch.Tensor]:
    """The state dict (fp32) of a new model, the same for the same seed. torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return config.arrange(dict(model_class(config)(config).named_parameters()))


def choose_blocks(recipe: str, n: int, k: int) -> list[int]:
    """The blocks of a reference with n blocks that become blocks 0 … k-1. Raises UserError for a wrong k."""
    if k > n and recipe != "stack":
        raise UserError(f"--layers {k} is more than the {n} blocks of the model")
    blocks = BLOCKS[recipe](n, k)
    if len(blocks) != k:
        raise UserError(f"{recipe} makes {len(blocks)} blocks out of {n}: --layers cannot be {k}")
    return blocks


def inherit(state: Mapping, config: Config, blocks: list[int]) -> tuple[dict, Config]:
    """(state dict, configuration) of the model with these blocks, repeats allowed (paper, Alg. 1)."""
    check_blocks(blocks, config.n_layer)
    return assemble(state, [(state, i) for i in blocks], config), config.with_blocks(blocks)


def grow_onto(
    small: Mapping, small_config: Config, state: Mapping, config: Config, k: int
) -> tuple[dict, Config]:
    """(state dict, configuration) of the small model with the reference's next blocks on top, k in all.
    Embeddings and final LayerNorm are the small model's."""
    n, most = small_config.n_layer, config.n_layer
    if n >= most:
        raise UserError(f"there is nothing to add: the small model has {n} blocks, the reference {most}")
    if not n < k <= most:
        raise UserError(f"layers must be between {n + 1} and {most} to grow {n} blocks onto, not {k}")
    same = dataclasses.replace(config.with_blocks(list(range(n))), block_size=small_config.block_size)
    ours, theirs = small_config.full_content(), same.full_content()
    for key in sorted((ours.keys() | theirs.keys()).difference(EXCHANGEABLE)):
        if ours.get(key) != theirs.get(key):
            found = f"{key} is {ours.get(key)} in the small model and {theirs.get(key)} in the reference"
            raise UserError(f"cannot grow: {found}")
    blocks = [(small, i) for i in range(n)] + [(state, i) for i in range(n, k)]
    run = {key: getattr(small_config, key) for key in ("block_size", "n_vocab", "tokenizer", "eot")}
    return assemble(small, blocks, config), dataclasses.replace(config.with_blocks(list(range(k))), **run)


def assemble(outside: Mapping, blocks: list[tuple[Mapping, int]], config: Config) -> dict:
    """A new state dict: everything of `outside` that is in no block, and for each (state dict, number) of
    `blocks` that block under its new number.

    Where attention logits are divided by (block number + 1), the queries of a block that gets another number
    are multiplied to make up for it: it computes what it did.
    """
    prefix, scaled = config.block_prefix, config.scale_attn_by_inverse_layer_idx
    new = {name: outside[name] for name in outside if not name.startswith(prefix)}
    for i, (state, number) in enumerate(blocks):
        old = f"{prefix}{number}."
        for name in state:
            if name.startswith(old):
                tensor = state[name]
                if scaled and i != number and ".attn.c_attn." in name:
                    tensor = scale_queries(tensor, (i + 1) / (number + 1))
                new[f"{prefix}{i}.{name.removeprefix(old)}"] = tensor
    return new


def scale_queries(tensor: torch.Tensor | LazyTensor, factor: float) -> torch.Tensor:
    """c_attn's weight (C, 3C) or bias (3C,) with its queries, the first C columns, times `factor`."""
    q, k, v = tensor[:].double().tensor_split(3, dim=-1)
    return torch.cat((q * factor, k, v), dim=-1).to(tensor.dtype)


def halve(state: Mapping, config: Config) -> tuple[dict, Config]:
    """(state dict, configuration) at half width: the first floor(n_head / 2) heads and their channels,
    and an MLP of 4 times that. The paper does not say which channels of embeddings and LayerNorms it
    keeps; the first ones go with the first heads."""
    n_head = config.n_head // 2
    if not n_head:
        raise UserError("half_width needs at least two heads")
    C, c = config.n_embd, n_head * (config.n_embd // config.n_head)

    small, new = dataclasses.replace(config, n_head=n_head, n_embd=c), {}
    for name, shape in shapes(vars(small)).items():
        tensor = state[name][: shape[0]] if len(shape) == 2 else state[name][:]
        if ".c_attn." in name:  # q, k and v side by side: the first c columns of each
            new[name] = tensor.unflatten(-1, (3, C))[..., :c].flatten(-2)
        else:
            new[name] = tensor[..., : shape[-1]].contiguous()
    return new, small
