"""Folders of models that model.py does not implement: transformers opens them, `cut_model` takes blocks of
them.

A cut renames tensors (`model.layers.7.…`, `gpt_neox.layers.7.…`), shortens the per-layer lists of
config.json, and copies everything else. Where a configuration depends on the place of a layer in other ways,
it is refused by name.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterable

from inheritune.base.errors import UserError
from inheritune.base.files import read_json, write_json
from inheritune.weights.checkpoint import new_lineage
from inheritune.weights.gpt2_format import CONFIG, stored_tensors
from inheritune.weights.initialisations import assemble, check_blocks, write_inherited

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # in config.json, one of them
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "indexer_types", "layer_rope_theta")  # lists
OTHER_LISTS = re.compile(r"architectures|_token_id")  # that may have as many entries by chance
# values by which transformers computes the lists above where they are missing: a cut writes the lists
COMPUTES_LISTS = re.compile(r"_?sliding_window_pattern|no_rope_layer_interval|max_window_layers")
# depend on the depth or on the place of a layer: the first never survive a cut, the others one to the first k
DEPTH = re.compile(r"depth|per_layer_input|per_layer_config|kv_shared|attention_types")
PLACE = re.compile(r"layer|block|_idxs?$|indices|interval|period|pattern|every|sparse_step|first_k")
HARMLESS = re.compile(r"layer_?norm|layerdrop|layer_scale")


def cut_model(source: str, out: str, choose: Callable[[int], list[int]], **notes) -> str:
    """Make a new folder `out` with some blocks of the model in the folder `source`; says in a text what it
    is. choose: gives the source blocks from their number. notes: kept in lineage.json."""
    full = open_by("AutoConfig", source).to_dict()
    depth = [key for key in DEPTHS if key in full]
    if len(depth) != 1:
        found = f"{source}/{CONFIG} has no one of {', '.join(DEPTHS)}"
        raise UserError(f"{found}: only plain text models can be cut")
    n = full[depth[0]]
    blocks = choose(n)
    check_blocks(blocks, n)
    changes = {depth[0]: len(blocks)} | cut_lists(source, full, n, blocks)
    config = read_json(os.path.join(source, CONFIG)) | changes
    check_result(source, config, full | changes)
    tensors = dict(stored_tensors(source))
    prefix = find_blocks(source, tensors, n)
    tensors = assemble(tensors, [(tensors, i) for i in blocks], False, prefix)
    size = write_inherited(source, out, tensors, config, {}, new_lineage(source, blocks, **notes))
    return f"{out}: {len(blocks)} of {n} blocks, {size}"


def cut_lists(source: str, full: dict, n: int, blocks: list[int]) -> dict:
    """The per-layer values of a configuration of n layers for these blocks. What depends on the place of a
    layer in another way is refused."""
    changes, refused = {}, []
    for key, value in full.items():
        if key in PER_LAYER and value:
            changes[key] = [value[i] for i in blocks]
        elif key == "max_window_layers":  # the layers before it attend to everything
            changes[key] = sum(i < value for i in blocks)
        elif isinstance(value, list) and len(value) == n > 1 and not OTHER_LISTS.search(key):
            refused.append(key)
        elif value in (None, False, 0, []) or key in DEPTHS or HARMLESS.search(key):
            continue
        elif DEPTH.search(key) or (PLACE.search(key) and blocks != list(range(len(blocks)))):
            follows = COMPUTES_LISTS.fullmatch(key) and any(full.get(name) for name in PER_LAYER)
            harmless = value == 1 and re.search("interval|step|period", key)  # every layer is the same
            refused += [] if follows or harmless else [key]
    if refused:
        problem = f"{', '.join(refused)} depends on the place of the layers"
        raise UserError(f"{source}/{CONFIG}: {problem}; perhaps it can be cut to its first blocks")
    return changes


def find_blocks(source: str, names: Iterable[str], n: int) -> str:
    """What the names of the tensors of all n blocks begin with."""
    numbers = {}
    for name in names:
        if match := re.match(r"((?:[^.]+\.)*?)(\d+)\.", name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
    if list(numbers.values()) != [set(range(n))]:
        found = ", ".join(f"{prefix}0…{max(places)}" for prefix, places in numbers.items()) or "none"
        raise UserError(f"{source}: expected the tensors of blocks 0 to {n - 1}, found {found}")
    return next(iter(numbers))


def check_result(source: str, config: dict, wanted: dict) -> None:
    """Raise UserError unless transformers reads from a new config.json what is wanted."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(os.path.join(folder, CONFIG), config)
        found = open_by("AutoConfig", folder).to_dict()
    wrong = sorted(key for key in wanted if found.get(key) != wanted[key] and key != "_name_or_path")
    if wrong:
        raise UserError(f"{source}/{CONFIG}: {', '.join(wrong)} cannot follow a cut")


def open_by(name: str, folder: str, **flags):
    """transformers.<name>.from_pretrained of a local folder, without its messages. Code in the folder is
    never run, and whatever goes wrong is a UserError of one line."""
    try:
        import transformers
    except ImportError:  # needs an extra package
        cure = "for others: pip install -r requirements-extra.txt"
        raise UserError(f"{folder} is no GPT-2 of ours; {cure}") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        opener = getattr(transformers, name)
        return opener.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **flags)
    except Exception as e:  # transformers raises what it likes: treat all of it as: cannot be opened
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"transformers cannot open {folder} ({type(e).__name__}: {reason:.150})") from None
