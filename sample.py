"""Sample from a model, text streaming out as it is drawn.

python sample.py --ckpt out/ --prompt "Once upon a time"
"""

import sys

import torch

from inheritune.base.errors import Parser, UserError, one_line
from inheritune.data.tokenizer import TextStream, has_tokenizer, load_tokenizer
from inheritune.training import device as machine
from inheritune.weights import checkpoint
from model import GPT, GPTConfig


def encode_prompt(prompt, tokenizer, config):
    """Ids (1, T) of a prompt; an empty one is a lone end-of-text, which is how every document of the corpus begins.

    Raises UserError when the tokenizer has ids that the model has not.
    """
    if tokenizer.n_vocab > config.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.n_vocab} ids, the model only {config.vocab_size}"
        )
    return torch.tensor([tokenizer.encode(prompt) or [config.eot]])


def stream(tokens, text, eot, out):
    """Write the first row of each step's ids (B,) to `out` as text, as soon as it makes whole characters.

    Returns all rows' ids as lists, each up to its end-of-text.
    """
    rows = None
    for step in tokens:
        step = step.tolist()
        rows = rows or [[] for _ in step]
        for row, token in zip(rows, step, strict=True):
            row.append(token)
        if step[0] != eot:
            out.write(text.add(step[0]))
            out.flush()
    out.write(text.end() + "\n")
    return [row[: row.index(eot)] if eot in row else row for row in rows]


def check(args):
    """Raise UserError for values that make no sense."""
    limits = (
        ("num_samples", args.num_samples >= 1, "at least 1"),
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= args.temperature < float("inf"), "0 (always the likeliest) or more"),
        ("top_k", args.top_k is None or args.top_k >= 1, "at least 1"),
        ("top_p", args.top_p is None or 0 < args.top_p <= 1, "above 0 and at most 1"),
    )
    for name, fine, wanted in limits:
        if not fine:
            raise UserError(f"--{name} must be {wanted}, not {getattr(args, name)}")


@one_line
def main(argv=None):
    """Command line: load a checkpoint and write samples to standard output."""
    parser = Parser(description="Sample text from a checkpoint.")
    parser.add_argument(
        "--ckpt", required=True, help="checkpoint folder, run folder (its best) or Hugging Face id"
    )
    parser.add_argument("--prompt", default="", help="text to continue; FILE:path reads it from a file")
    parser.add_argument(
        "--num_samples", type=int, default=1, help="drawn together in one batch; the first streams"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, help="tokens per sample, unless end-of-text comes"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top_k", type=int, help="draw from this many likeliest tokens only")
    parser.add_argument(
        "--top_p", type=float, help="draw from the likeliest tokens that make up this probability"
    )
    parser.add_argument("--seed", type=int, default=1337, help="of the draws")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights (default: bfloat16 on GPUs that have it, else float32); on CPUs bfloat16 makes one sample "
        "faster but may make many slower, and changes logits by 1 %% of their spread (bench/sampling.py)",
    )
    parser.add_argument(
        "--tokenizer", help="bytes, a tiktoken name or a tokenizer.json, where the checkpoint does not say"
    )
    args = parser.parse_args(argv)
    check(args)
    device = machine.pick(args.device)
    folder = checkpoint.find(args.ckpt)
    config = GPTConfig.from_folder(folder)
    if not (args.tokenizer or config.tokenizer or has_tokenizer(folder)):
        raise UserError(f"{folder} does not say what tokenizer it was trained with: give --tokenizer")
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else load_tokenizer(config.tokenizer, folder)
    prompt = args.prompt
    if prompt.startswith("FILE:"):
        try:
            with open(prompt[5:], encoding="utf-8") as f:
                prompt = f.read()
        except UnicodeDecodeError:
            raise UserError(f"{prompt[5:]} is not a UTF-8 text file") from None
    idx = encode_prompt(prompt, tokenizer, config).repeat(args.num_samples, 1).to(device)

    model = GPT.from_pretrained(folder).eval().to(device, machine.pick_dtype(args.dtype, device))
    generator = torch.Generator().manual_seed(args.seed)
    tokens = model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator)
    sys.stdout.write(prompt)
    rows = stream(tokens, TextStream(tokenizer, idx[0].tolist()), config.eot, sys.stdout)
    for row in rows[1:]:
        print(f"{'-' * 20}\n{prompt}{tokenizer.decode(row)}")


if __name__ == "__main__":
    main()
