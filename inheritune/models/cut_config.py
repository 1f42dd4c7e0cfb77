"""The config.json of a model that has some blocks of another, whatever its keys mean.

Example: blocks [0, 2] of a Qwen2 make
    {"num_hidden_layers": 3, "layer_types": ["full_attention", "full_attention", "sliding_attention"]}
  → {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}

No key but DEPTHS is trusted. The depth is changed, lists with an entry for each block are cut, and the
skeletons of both models are compared: block j of the result must be what block blocks[j] of the source is,
module by module, and all else must be the same. Where they differ, other values are tried for numbers and
lists that may depend on the place of a block (`first_k_dense_replace`, `mlp_only_layers`). Where nothing
helps, the cut is refused, and the difference is named.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator

import torch
from torch import nn

from inheritune.base.errors import UserError
from inheritune.models.blocks import check_blocks
from inheritune.models.meta_model import (
    find_blocks,
    skeleton,
    stored_shapes,
    transformers_config,
    using_transformers,
)

DEPTHS = "num_hidden_layers", "n_layer", "num_layers", "n_layers"  # keys for the depth; some configs have two
TRIES = 60  # configurations that are compared before a cut is refused


def cut_content(content: dict, blocks: list[int]) -> tuple[dict, str]:
    """(config.json of the model with these blocks, a warning for readers of config.json, or '').

    Raises UserError when no config.json gives these blocks.
    """
    c = transformers_config(json.dumps(content))
    n = c.num_hidden_layers
    check_blocks(blocks, n)
    depth = {key: len(blocks) for key in DEPTHS if content.get(key) == n} or {DEPTHS[0]: len(blocks)}
    with using_transformers() as transformers:
        general = transformers.PreTrainedConfig().to_dict().keys() | {"architectures"}
    own = {key: v for key, v in c.to_dict().items() if key not in (general | depth.keys())}
    lists = {key: cut for key, v in own.items() if (cut := cut_list(v, n, blocks)) is not None}

    shared = [key for key in lists if "shared" in own[key]]  # these use what an earlier block has computed
    if shared and blocks != list(range(len(blocks))):
        raise UserError(f"its blocks share results ({shared[0]}): only the first ones can be taken")

    reason, changes = None, [*itertools.islice(alternatives(own, lists, n, blocks), TRIES)]
    # last try: leave lists that each block holds whole out of the comparison (GPT-Neo)
    for change, lists_may_differ in [*itertools.product(changes, [False]), ({}, True)]:
        wanted = lists | change
        new = add_computed(content | depth, wanted)
        problem = difference(json.dumps(content), json.dumps(new), blocks, lists_may_differ)
        if problem is None:
            return without_contradiction(content, new, {k: wanted[k] for k in lists}, blocks)
        reason = reason or problem
    raise UserError(f"blocks {', '.join(map(str, blocks))} alone are no {c.model_type}: {reason}")


def cut_list(value, n: int, blocks: list[int]) -> list | None:
    """What becomes of a list with an entry for each of n blocks; None for any other value."""
    if not isinstance(value, list):
        return None
    try:  # [[["global", "local"], 6]] has 12 entries
        entries = [entry for pattern, times in value for entry in [*pattern] * times]
        nested = all(type(times) is int for _, times in value)
    except (TypeError, ValueError):
        nested = False
    if nested and value:
        return [[[entries[i] for i in blocks], 1]] if len(entries) == n else None
    return [value[i] for i in blocks] if len(value) == n else None


def alternatives(own: dict, lists: dict, n: int, blocks: list[int]) -> Iterator[dict]:
    """Changes of configuration keys to try, the likeliest first: none, one, two."""
    options = []
    for key, value in own.items():
        if key in lists:  # it may have n entries by chance: try it uncut
            options.append({key: value})
        elif isinstance(value, dict):
            cuts = {k: cut for k, v in value.items() if (cut := cut_list(v, n, blocks)) is not None}
            options += [{key: value | cuts}] if cuts else []
        elif isinstance(value, list) and value and all(type(v) is int and 0 <= v < n for v in value):
            options.append({key: [j for j, i in enumerate(blocks) if i in value]})  # numbers of blocks
        elif type(value) is int and 0 < value <= n:
            # a number of first blocks (try how many stay), or a period (1: every block, n + 1: none)
            count = sum(i < value for i in blocks)
            others = dict.fromkeys((count, 1, len(blocks) + 1))
            options += [{key: other} for other in others if other != value]
    yield {}
    yield from options
    yield from (a | b for a, b in itertools.combinations(options, 2) if not a.keys() & b.keys())


def add_computed(content: dict, wanted: dict) -> dict:
    """Set those keys of `wanted` in `content` that it has, or whose computed default would differ."""
    new = content | {key: value for key, value in wanted.items() if key in content}
    try:
        found = transformers_config(json.dumps(new)).to_dict()
    except UserError:
        found = {}
    return new | {key: value for key, value in wanted.items() if found.get(key) != value}


def without_contradiction(content: dict, new: dict, lists: dict, blocks: list[int]) -> tuple[dict, str]:
    """Drop or adapt numbers of `new` that contradict its lists. Returns (new, a warning or "").

    Example: Qwen's max_window_layers is the first block with a sliding window, from which layer_types is
    computed where it is missing. A reader that ignores layer_types must compute the same.

    content, new: config.json of the source, and of the model with these blocks of it.
    lists: {key of new: its list with an entry for each block}.
    """

    def computed(content):
        """The lists that transformers computes where config.json has none; None where it cannot."""
        try:
            found = transformers_config(json.dumps({k: v for k, v in content.items() if k not in lists}))
        except UserError:
            return None
        return {key: found.to_dict().get(key) for key in lists}

    if not lists or computed(new) in (lists, None):
        return new, ""
    source = json.dumps(content)

    def decides_a_list(key):
        now = computed(new)  # which changes while numbers are adapted
        return any(computed(new | {key: new[key] + d}) not in (now, None) for d in (1, -1))

    numbers = [key for key, value in new.items() if type(value) is int and key not in DEPTHS]
    for key in filter(decides_a_list, numbers):
        adapted = new | {key: sum(i < new[key] for i in blocks)}
        without = {k: v for k, v in new.items() if k != key}
        other = adapted if computed(adapted) == lists else without
        if difference(source, json.dumps(other), blocks) is None:
            new = other
    if computed(new) == lists:
        return new, ""
    names = " and ".join(key for key in lists if computed(new)[key] != lists[key])
    what = "computing it from the block number gives another model"
    return new, f"readers must use {names} of config.json; {what}"


def difference(source: str, new: str, blocks: list[int], lists_may_differ=False) -> str | None:
    """A line on how the model of the config.json `new` is not that of `source` with these blocks, or None."""
    try:
        before, after = skeleton(source), skeleton(new)
    except UserError as e:
        return str(e)
    if after.config.num_hidden_layers != len(blocks):
        return f"it has {after.config.num_hidden_layers} blocks"
    prefix, sources, results = find_blocks(before)[0], facts_of_blocks(source), facts_of_blocks(new)
    numbers = block_numbers(sources)
    was, became = before.config.to_dict(), after.config.to_dict()
    lists = [(v, became.get(key)) for key, v in was.items() if lists_may_differ and isinstance(v, list)]
    for j, i in enumerate(blocks):
        for key in sorted(sources[i].keys() | results[j].keys()):
            a, b = sources[i].get(key), results[j].get(key)
            if a != b and (a, b) not in lists and not (key in numbers and b == numbers[key] + j):
                name = ".".join(part for part in key if part)
                return f"{name} of block {i} is {a!s:.60}, that of the new block {j} {b!s:.60}"
    rest = outside(before, prefix)
    if changed := [name for name, what in outside(after, prefix).items() if rest.get(name) != what]:
        return f"{changed[0]}, outside of the blocks, becomes another"
    return wrong_tensors(stored_shapes(source), stored_shapes(new), prefix, blocks)


def wrong_tensors(before: dict, after: dict, prefix: str, blocks: list[int]) -> str | None:
    """The first tensor that the blocks of `before` do not give to `after`, as text; both {name: shape}."""
    moved = {name: shape for name, shape in before.items() if not name.startswith(prefix)}
    for j, i in enumerate(blocks):
        old = f"{prefix}{i}."
        moved |= {f"{prefix}{j}.{n[len(old) :]}": s for n, s in before.items() if n.startswith(old)}
    names = sorted(moved.keys() | after.keys())
    wrong = next((name for name in names if moved.get(name) != after.get(name)), None)
    return wrong and f"{wrong} is {moved.get(wrong)} of the blocks and {after.get(wrong)} of the new model"


@functools.lru_cache(maxsize=8)
def facts_of_blocks(source: str) -> list[dict]:
    return [facts(block) for block in find_blocks(skeleton(source))[1]]


def facts(block: nn.Module) -> dict[tuple, object]:
    """{(module, what): value} of a block: types, shapes of parameters, buffers, and plain attributes."""
    found, internal = {}, vars(nn.Module())
    for name, module in block.named_modules():
        found[name, "type"] = type(module).__qualname__
        own = {key: value for key, value in vars(module).items() if key not in internal}
        for key, value in (own | module._parameters | module._buffers).items():
            found[name, key] = plain(value)
    return found


def plain(value):
    """A form of a value that can be compared: of a tensor shape and content, of an object its class."""
    if isinstance(value, torch.Tensor):
        data = b"" if value.is_meta else value.detach().float().numpy().tobytes()
        return f"{tuple(value.shape)} {hashlib.sha256(data).hexdigest()[:8] if data else ''}"
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    simple = isinstance(value, (bool, int, float, str, type(None), torch.dtype))
    return value if simple else getattr(value, "__qualname__", type(value).__qualname__)


def block_numbers(blocks: list[dict]) -> dict[tuple, int]:
    """{key: start} of the facts whose value is start + block number."""
    numbers = {}
    for key in {key for block in blocks for key in block}:
        found = [(i, block[key]) for i, block in enumerate(blocks) if key in block]
        starts = {value - i for i, value in found if type(value) is int}
        if len(starts) == 1 and all(type(value) is int for _, value in found):
            numbers[key] = starts.pop()
    return numbers


def outside(model: nn.Module, prefix: str) -> dict[str, object]:
    """{name: what it is} of modules and tensors outside of the blocks."""
    found = {name: type(module).__qualname__ for name, module in model.named_modules()}
    found |= {name: plain(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    return {name: value for name, value in found.items() if not name.startswith(prefix)}
