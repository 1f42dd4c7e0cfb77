"""Sample from a model; the text streams out as it is drawn.

python sample.py --ckpt out/ --prompt "Once upon a time"
"""

import dataclasses
import sys
from collections.abc import Iterable
from typing import TextIO

import torch

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.base.files import read_optional
from inheritune.base.tokenizer_identity import has_tokenizer
from inheritune.data.tokenizer import TextStream, Tokenizer, load_tokenizer
from inheritune.models.open_model import Config, load_model, open_config
from inheritune.training.device import DTYPE_CHOICES, pick, pick_dtype
from inheritune.weights import checkpoint

# nanoGPT's flags
NANOGPT = {
    "start": 'write --prompt; "$(cat FILE)" is the text of a file',
    "out_dir": "write --ckpt; it takes the folder of a run",
    "init_from": "write --ckpt FOLDER, or --ckpt gpt2",
    "compile": "leave it out",
}


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(description="Sample text from a checkpoint.", instead=NANOGPT)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint folder, run folder (its best) or Hugging Face id")
    add("--prompt", default="", help="text to continue")
    add("--num_samples", type=int, default=1, help="drawn together in one batch; the first streams")
    add("--max_new_tokens", type=int, default=256, help="tokens per sample, unless end-of-text comes")
    add("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    add("--top_k", type=int, help="draw from this many likeliest tokens only")
    add("--top_p", type=float, help="draw from the likeliest tokens that make up this probability")
    add("--seed", type=int, default=1337, help="of the draws")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    dtype_help = (
        "of the weights; auto: 16 bits on CUDA and on CPUs with AMX (there faster for one sample only)"
    )
    add("--dtype", default="auto", choices=DTYPE_CHOICES, help=dtype_help)
    add("--tokenizer", help="bytes, a tiktoken name or a tokenizer.json, where the checkpoint does not say")
    return parser


def check_ranges(args):
    """Raise UserError for values that make no sense."""
    limits = (
        ("num_samples", args.num_samples >= 1, "at least 1"),
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= args.temperature < float("inf"), "0 (always the likeliest) or more"),
        ("top_k", args.top_k is None or args.top_k >= 1, "at least 1"),
        ("seed", -(2**63) <= args.seed < 2**64, "a number of 64 bits"),
        ("top_p", args.top_p is None or 0 < args.top_p <= 1, "above 0 and at most 1"),
    )
    for name, fine, wanted in limits:
        if not fine:
            raise UserError(f"--{name} must be {wanted}, not {getattr(args, name)}")


def open_tokenizer_of(folder: str, config: Config, name: str | None) -> Tokenizer:
    """The tokenizer called `name`, or else that of the checkpoint folder."""
    if not (name or config.tokenizer or has_tokenizer(folder)):
        raise UserError(f"{folder} does not say what tokenizer it was trained with: give --tokenizer")
    tokenizer = load_tokenizer(name) if name else load_tokenizer(config.tokenizer, folder)
    n = tokenizer.n_vocab
    if n > config.vocab_size:
        raise UserError(f"tokenizer {tokenizer.name!r} has {n} ids, the model only {config.vocab_size}")
    tokenizer.recognise_special()  # such as those of a chat
    return tokenizer


def find_ends(folder: str, tokenizer: Tokenizer) -> set[int]:
    """The ids that end a sample: the tokenizer's end-of-text, and the eos_token_id (an id, or a list of ids)
    of config.json and generation_config.json. A chat model's turn ends by another token than a text."""
    ends = {tokenizer.eot}
    for name in ("config.json", "generation_config.json"):
        ids = (read_optional(folder, name) or {}).get("eos_token_id")
        ends |= {i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int}
    return ends


def encode_prompt(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt. Special tokens spelled out in it are their ids.

    A beginning-of-text comes first where the tokenizer has one, as Llama's does, unless the prompt spells it
    out. Without any id, the prompt is a lone end-of-text: documents of the corpus begin after one.
    """
    first, *others = prompt.split(tokenizer.decode([tokenizer.eot]))
    ids, bos = tokenizer.encode(first), tokenizer.bos_ids
    for part in others:
        ids += [tokenizer.eot, *tokenizer.encode(part)]
    ids = ids if ids[: len(bos)] == bos else bos + ids
    return ids or [tokenizer.eot]


def stream(steps: Iterable[torch.Tensor], text: TextStream, ends: set[int], out: TextIO) -> list[list[int]]:
    """Write the first row of each step's ids (B,) to `out` as text, as soon as it makes whole characters.

    Returns the ids of each row, up to its end, once all rows have ended.
    """
    rows, ended = [], set()
    for step in steps:
        ids = step.tolist()
        rows = rows or [[] for _ in ids]
        ended |= {b for b, i in enumerate(ids) if i in ends}
        for b in set(range(len(ids))) - ended:
            rows[b].append(ids[b])
        if 0 not in ended:
            out.write(text.add(ids[0]))
            out.flush()
        if len(ended) == len(ids):
            break
    out.write(text.end() + "\n")
    return rows


@one_line
def main(argv=None):
    """Command line: load a checkpoint and write samples to standard output."""
    args = make_parser().parse_args(argv)
    check_ranges(args)
    device = pick(args.device)
    folder = checkpoint.find(args.ckpt)
    config = open_config(folder)
    tokenizer = open_tokenizer_of(folder, config, args.tokenizer)
    ids = encode_prompt(args.prompt, tokenizer)
    if max(ids) >= config.vocab_size:
        raise UserError(f"the prompt holds a special token, id {max(ids)}, that the model does not have")

    if len(ids) > config.limit:
        read = f"the model reads only the last {config.limit:,}"
        print(f"the prompt has {len(ids):,} tokens, of which {read}", file=sys.stderr)

    model = load_model(folder).eval()
    for p in model.parameters():  # not the buffers: rotary frequencies stay in fp32
        p.data = p.data.to(pick_dtype(args.dtype, device))
    model.to(device)  # now, as fp32 weights would need twice the room there
    # draw the tokenizer's ids only
    n_vocab = min(tokenizer.n_vocab, config.n_vocab)
    model.config = dataclasses.replace(model.config, n_vocab=n_vocab, eot=tokenizer.eot)

    idx = torch.tensor([ids], device=device).repeat(args.num_samples, 1)  # (B, T)
    generator = torch.Generator().manual_seed(args.seed)
    steps = model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator)
    sys.stdout.write(args.prompt)
    rows = stream(steps, TextStream(tokenizer, ids), find_ends(folder, tokenizer), sys.stdout)
    for row in rows[1:]:
        text = TextStream(tokenizer, ids)
        print(f"{'-' * 20}\n{args.prompt}{''.join(map(text.add, row))}{text.end()}")


if __name__ == "__main__":
    main()
