"""Sampling on the CPU at GPT-2 124M's shape: against recomputing the prefix, transformers' generate, and the
memory.

    python bench/sampling.py        # 256 new tokens; four minutes

The limit is the time in which the fp32 weights are read once, at the speed at which torch.sum reads a large
tensor in the same round. Recomputing is timed at every eighth length and counted eightfold.
"""

import copy
import statistics

import harness
import torch
from harness import row

from inheritune.training.device import pick
from model import GPT, GPTConfig, next_token

NEW, PROMPT = 256, 8


def ours(model, rows):
    """Sample NEW tokens for each of `rows` rows."""
    idx = torch.arange(PROMPT).repeat(rows, 1)
    for _ in model.generate(idx, NEW, temperature=1.0, generator=torch.Generator().manual_seed(1)):
        pass


@torch.inference_mode()
def recompute(model):
    """An eighth of what sampling NEW tokens costs without a cache."""
    for length in range(PROMPT, PROMPT + NEW, 8):
        next_token(model.lm_head(model.hidden(torch.zeros(1, length, dtype=torch.long))[:, -1]))


def hugging_face(config):
    """A function that samples NEW tokens with transformers' `generate` and its cache."""
    import transformers

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=config.vocab_size, eos_token_id=None, bos_token_id=None)
    ).eval()
    idx = torch.arange(PROMPT)[None]
    mask = torch.ones_like(idx)

    def generate():
        out = model.generate(
            idx, attention_mask=mask, max_new_tokens=NEW, do_sample=True, top_k=0, pad_token_id=0
        )
        assert out.size(1) == PROMPT + NEW

    return generate


def logit_error(model, half):
    """(largest, root mean square) difference of the logits of two models on random ids, and the logits' own
    spread."""
    torch.manual_seed(0)
    idx = torch.randint(0, 50257, (2, 128))
    with torch.inference_mode():
        a, b = model(idx), half(idx).float()
    return (a - b).abs().max().item(), (a - b).pow(2).mean().sqrt().item(), a.std().item()


def main():
    """Measure and report."""
    pick("cpu")
    torch.manual_seed(0)
    config = GPTConfig(bias=False, eot=50257, n_vocab=50304)  # nothing ends a text
    model = GPT(config).eval()
    half = copy.deepcopy(model).bfloat16()
    big = torch.randn(150_000_000)
    reading = []

    def read(name):
        reading.append(big.numel() * 4 / harness.seconds(big.sum))

    works = {
        "ours": lambda: ours(model, 1),
        "recompute": lambda: recompute(model),
        "transformers": hugging_face(config),
        "16 rows": lambda: ours(model, 16),
        "bf16": lambda: ours(half, 1),
    }
    times = harness.interleaved(works, prepare=read)
    bandwidth = statistics.median(reading)
    weights = 4 * sum(p.numel() for n, p in model.named_parameters() if "wpe" not in n)
    token = times["ours"] / NEW
    largest, rms, spread = logit_error(model, half)
    prefix, hugging = 8 * times["recompute"] / times["ours"], times["transformers"] / times["ours"]
    reached = 100 * weights / bandwidth / token
    many = 16 * times["ours"] / times["16 rows"]
    harness.report(
        [
            row("sampling: one token, batch 1", 1000 * token, "ms"),
            row("sampling: speed / recomputing the prefix", prefix, "ratio", ">= 5"),
            row("sampling: speed / transformers", hugging, "ratio", ">= 1.8"),
            row("sampling: reading memory", bandwidth / 1e9, "GB/s"),
            row("sampling: share of reading the weights once", reached, "%", ">= 70"),
            row("sampling: tokens/s of batch 16 / batch 1", many, "ratio", ">= 8"),
            row("sampling in bf16: speed / fp32, batch 1", times["ours"] / times["bf16"], "ratio"),
            row("sampling in bf16: largest change of a logit / their sd", largest / spread, "ratio"),
            row("sampling in bf16: rms change of the logits / their sd", rms / spread, "ratio"),
        ]
    )


if __name__ == "__main__":
    main()
