"""Every causal type of transformers that can be made tiny: cut, and analysed, against transformers itself.

pytest -m slow tests/models/test_sweep.py                 # the test: nothing is silently wrong
python -m tests.models.test_sweep > results/decoders.md   # the table
"""

import itertools
import tempfile

import pytest
import torch
import transformers
from torch.nn import functional as F

from inheritune.base.errors import UserError
from inheritune.experiments.attention_metrics import measure_layers
from inheritune.models.open_model import load_model
from tests.other_models import TYPES, build, cut, without

CUTS = {
    "first half": lambda n: [*range(n // 2)],
    "last half": lambda n: [*range(n // 2, n)],
    "every second": lambda n: [*range(0, n, 2)],
    "ends": lambda n: [0, n - 1],
}
IDX = torch.randint(3, 257, (1, 20), generator=torch.Generator().manual_seed(5))
EXACT, CLOSE = "exact", 1e-4  # of the largest value


def close(a, b) -> bool:
    return bool((a - b).abs().max() <= CLOSE * b.abs().max())


def check_cut(theirs, folder: str, blocks: list[int]) -> str:
    """EXACT if the cut model's logits are those of the source's blocks, why it is refused, or WRONG."""
    try:
        model = cut(folder, blocks)
    except UserError as e:
        return str(e).replace(folder, "F")
    with torch.no_grad():
        return EXACT if close(model(IDX), without(theirs, blocks, IDX)) else "WRONG"


def check_analysis(theirs, folder: str) -> str:
    """EXACT if influence, norms and sinks are those of what transformers itself gives out, else why not."""
    try:
        heads, influence, norms = measure_layers(load_model(folder), IDX)
    except UserError as e:
        return str(e).replace(folder, "F")
    with torch.no_grad():
        out = theirs(IDX, output_attentions=True, output_hidden_states=True, use_cache=False)
    # the last ones have passed the final norm; Mamba's and RWKV's first ones are those behind block 0
    hidden = out.hidden_states[: len(influence)]
    lengths = torch.stack([x.norm(dim=-1).mean() for x in hidden]).double()
    first = 0 if close(norms[:1], lengths[:1]) else 1
    turned = [1 - F.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(hidden)]
    turned = torch.stack(turned).double()[: len(influence) - 1 - first]
    same = close(influence[first:][: len(turned)], turned)
    n = len(influence) - first
    same &= close(norms[first:][:n], lengths[:n])
    if not heads:
        return f"{EXACT}, no matrices" if same else "WRONG"
    A = torch.stack(out.attentions, 1)  # (B, n_layer, nh, T, T)
    sinks = (A[..., 0] + 1 - A.sum(-1)).mean((0, -1)).double()
    return EXACT if same and close(heads["sink"], sinks) else "WRONG"


def check_type(kind: str) -> dict[str, str] | None:
    """{what was tried: how it went}, or None for a type that cannot be made tiny or does not run."""
    try:
        theirs = build(kind, depth=6)
        with torch.no_grad():
            theirs(IDX, use_cache=False)
    except Exception:  # of transformers, which says what it likes about sizes that do not fit
        return None
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        n = theirs.config.num_hidden_layers
        results = {name: check_cut(theirs, folder, choose(n)) for name, choose in CUTS.items()}
        return results | {"analysis": check_analysis(theirs, folder)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_cut_and_analysis_are_right_or_refused(kind):
    results = check_type(kind)
    if results is None:
        pytest.skip("cannot be made tiny")
    assert "WRONG" not in results.values()
    assert all("\n" not in text for text in results.values())


def main():
    torch.set_num_threads(1)
    found = {kind: results for kind in TYPES if (results := check_type(kind)) is not None}
    columns = [*CUTS, "analysis"]
    exact = {name: sum(r[name].startswith(EXACT) for r in found.values()) for name in columns}
    print(f"""# Causal models of transformers {transformers.__version__}, cut and analysed

`python -m tests.models.test_sweep > results/decoders.md` makes this table. Of {len(TYPES)} causal types
{len(found)} can be made tiny and run. A random model of 6 blocks is cut to its first 3, its last 3, every
second and the two ends. *Exact*: the logits are those of the source whose other blocks return their input, to
{CLOSE:g} of the largest. *Analysis*: norms, block influence and sinks are those of transformers' own hidden
states and attentions, to the same. All else is refused, with a sentence that stands below the table.

| type | {" | ".join(columns)} |
|---|{"---|" * len(columns)}""")
    for kind, results in found.items():
        cells = [text if text.startswith((EXACT, "WRONG")) else "refused" for text in results.values()]
        print(f"| {kind} | {' | '.join(cells)} |")
    print(f"| **exact** | {' | '.join(f'**{exact[name]}**' for name in columns)} |\n")
    for kind, results in found.items():
        reasons = {}
        for name, text in results.items():
            if not text.startswith((EXACT, "WRONG")):
                reasons.setdefault(text, []).append(name)
        for text, names in reasons.items():
            print(f"* {kind}, {', '.join(names)}: {text}")


if __name__ == "__main__":
    main()
