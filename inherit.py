"""Inherit: make a smaller GPT out of the first blocks of a larger one (paper, Algorithm 1, step 2).

    python inherit.py --ckpt gpt2-large --layers 18 --out out-gpt2-large-18

The new model has the chosen blocks, renumbered, and the larger one's token and position embeddings, final LayerNorm
and tied head. (The authors' released script leaves positions and final LayerNorm random; ours does not.)
"""

import dataclasses
import hashlib
import os
import re

import checkpoint
import hf
from errors import Parser, UserError, one_line
from files import read_json, write_json


def assemble(base, blocks):
    """A new state dict: all of `base` outside its blocks, and for each (state, number) of `blocks` that block.

    State dicts map canonical names (`transformer.h.0.…`) to tensors and are only read, and only the tensors that are
    kept; the result refers to the same tensors, in their dtype.
    """
    new = {name: base[name] for name in base if not name.startswith("transformer.h.")}
    for i, (state, number) in enumerate(blocks):
        old, here = f"transformer.h.{number}.", f"transformer.h.{i}."
        new.update({here + name[len(old) :]: state[name] for name in state if name.startswith(old)})
    return new


def inherit(state, config, blocks):
    """(state, config) of the model with only these blocks (a list of numbers) of the given one.

    Neither argument is changed. Raises UserError when a block is not there.
    """
    check_blocks(blocks, config)
    return assemble(state, [(state, i) for i in blocks]), dataclasses.replace(config, n_layer=len(blocks))


def grow_onto(small, small_config, state, config, k):
    """(state, config) of the trained small model with the reference's next blocks on top, up to k in all.

    Embeddings and final LayerNorm are the small model's. Raises UserError when the two do not fit together.
    """
    n = small_config.n_layer
    if not n < k <= config.n_layer:
        raise UserError(f"layers must be between {n + 1} and {config.n_layer} to grow {n} blocks onto, not {k}")
    for key in ("n_embd", "n_head", "block_size", "vocab_size", "bias", "scale_attn_by_inverse_layer_idx"):
        here, there = getattr(small_config, key), getattr(config, key)
        if here != there:
            raise UserError(f"cannot grow: {key} is {here} in the small model and {there} in the reference")
    blocks = [(small, i) for i in range(n)] + [(state, i) for i in range(n, k)]
    return assemble(small, blocks), dataclasses.replace(small_config, n_layer=k)


def check_blocks(blocks, config):
    """Raise UserError unless every number is a block of a model with `config`, and there is at least one."""
    missing = [i for i in blocks if not 0 <= i < config.n_layer]
    if not blocks or missing:
        what = f"block {missing[0]}" if missing else "at least one block"
        raise UserError(
            f"asked for {what}, but the model has blocks 0 to {config.n_layer - 1} ({config.n_layer} layers)"
        )


def parse_blocks(text):
    """[0, 1, 2, 23] from "0-2,23". Raises UserError."""
    blocks = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise UserError(f"--blocks {text!r}: {part!r} is not a number or a range; write them like 0-11,23")
        blocks += range(int(match[1]), int(match[2] or match[1]) + 1)
    return blocks


def identify(folder):
    """What lineage.json says of a source checkpoint: name, step, size, and a hash of the header and of samples.

    Enough to tell one model from another without reading gigabytes; the name keeps two path components, no more.
    """
    files = {}
    for name in sorted(n for n in os.listdir(folder) if n.endswith(".safetensors") and n != "optimizer.safetensors"):
        path = os.path.join(folder, name)
        size, digest = os.path.getsize(path), hashlib.sha256()
        with open(path, "rb") as f:
            digest.update(f.read(int.from_bytes(f.read(8), "little")))
            for i in range(64):
                f.seek(size * i // 64)
                digest.update(f.read(1024))
        files[name] = {"bytes": size, "sample_sha256": digest.hexdigest()}
    state = os.path.join(folder, "state.json")
    return {
        "name": "/".join(os.path.abspath(folder).split(os.sep)[-2:]),
        "step": read_json(state).get("step") if os.path.exists(state) else None,
        "files": files,
    }


def lineage(folder, blocks, onto=None, onto_layers=0):
    """The content of lineage.json: for every block of the new model, which block of which source it was."""
    names = ["onto"] * onto_layers + ["reference"] * (len(blocks) - onto_layers)
    sources = {"reference": identify(folder) | {"lineage": checkpoint.lineage_of(folder)}}
    if onto:
        sources["onto"] = identify(onto) | {"lineage": checkpoint.lineage_of(onto)}
    return {
        "blocks": [{"from": source, "block": b} for source, b in zip(names, blocks, strict=True)],
        "embeddings_and_ln_f": "onto" if onto else "reference",
        "sources": sources,
    }


@one_line
def main(argv=None):
    """Command line: slice or grow a checkpoint into a new folder."""
    parser = Parser(description="Make a smaller GPT checkpoint out of a larger one's blocks.")
    parser.add_argument("--ckpt", required=True, help="the larger model: checkpoint, run folder or Hugging Face id")
    parser.add_argument("--out", required=True, help="folder to create")
    parser.add_argument("--layers", type=int, help="keep the first this many blocks")
    parser.add_argument("--blocks", help="keep these blocks instead, e.g. 0-11,23")
    parser.add_argument("--onto", help="a smaller trained checkpoint to grow: its blocks, then --ckpt's up to --layers")
    args = parser.parse_args(argv)
    if (args.layers is None) == (args.blocks is None):
        raise UserError("give --layers K or --blocks LIST, one of them")
    if args.onto and args.layers is None:
        raise UserError("--onto needs --layers K, the depth to grow to")
    if args.layers is not None and args.layers < 1:
        raise UserError(f"--layers must be at least 1, not {args.layers}")

    folder = checkpoint.find(args.ckpt)
    weights, config = hf.open_model(folder)
    if args.onto:
        onto = checkpoint.find(args.onto)
        small, small_config = hf.open_model(onto)
        blocks = list(range(args.layers))
        state, new_config = grow_onto(small, small_config, weights, config, args.layers)
        origin = lineage(folder, blocks, onto, small_config.n_layer)
    else:
        blocks = list(range(args.layers)) if args.layers else parse_blocks(args.blocks)
        state, new_config = inherit(weights, config, blocks)
        origin = lineage(folder, blocks)
    with checkpoint.new_folder(args.out) as temporary:
        hf.write_model(temporary, state, new_config, tokenizer_from=folder)
        write_json(os.path.join(temporary, "lineage.json"), origin)
    total = sum(t.numel() for t in state.values())
    print(f"{args.out}: {new_config.n_layer} of {config.n_layer} blocks, {total:,} values; train it with")
    print(f"  python train.py --init_from={args.out} …")


if __name__ == "__main__":
    main()
