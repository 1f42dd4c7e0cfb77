"""What grow.py leaves for people: report.md, loss.png and results.json."""

import dataclasses
import math
import os

from inheritune.base.files import replacing, write_json
from inheritune.experiments.plots import curve, plot_losses

STYLES = {
    "reference": {"color": "black"},
    "inheritune": {"color": "tab:red"},
    "random": {"color": "tab:blue"},
    "random_matched": {"color": "tab:green"},
}


def label(arm):
    """An arm's name in tables and legends."""
    names = {"random": "random init, as many steps", "random_matched": "random init, compute of the whole pipeline"}
    return f"{names.get(arm.arm, arm.arm)}, {arm.n_layer} blocks"


def table(arms):
    """The arms as a Markdown table; a training token or FLOP count that nobody knows is a dash."""
    rows = [
        "| model | parameters | training tokens | training FLOPs | validation loss | perplexity |",
        "|---|" + "---:|" * 5,
    ]
    for a in arms:
        tokens = "–" if a.tokens is None else f"{a.tokens:,}"
        flops = "–" if a.flops is None else f"{a.flops:.3g}"
        perplexity = f"{math.exp(a.val_loss):.3f}"
        rows.append(f"| {label(a)} | {a.params:,} | {tokens} | {flops} | {a.val_loss:.4f} | {perplexity} |")
    return "\n".join(rows)


def against(a, b):
    """'0.1234 below' or '0.1234 above', for a's loss seen from b's."""
    return f"{abs(a - b):.4f} {'below' if a <= b else 'above'}"


def verdicts(arms, target):
    """One sentence for each comparison, saying what it means, whichever way it falls."""
    by_name = {a.arm: a for a in arms}  # of several rounds the last
    ours, reference = by_name["inheritune"], by_name["reference"]
    matched = ours.val_loss <= target
    lines = [
        f"Against the reference: {ours.n_layer} of its {reference.n_layer} blocks "
        f"({ours.params / reference.params:.0%} of the parameters) end {against(ours.val_loss, target)} its loss: "
        + ("matched." if matched else "not matched, at the deepest size tried.")
    ]
    if "random" in by_name:
        gap = against(ours.val_loss, by_name["random"].val_loss)
        lines.append(
            f"Against the same small model from random init for as many steps: {gap} it. This is what inheriting gives "
            "to someone who has the reference already."
        )
    if "random_matched" in by_name:
        other = by_name["random_matched"]
        better = ours.val_loss <= other.val_loss
        lines.append(
            "Against random init trained for the compute of the whole pipeline, reference included "
            f"({other.flops:.3g} FLOPs): {against(ours.val_loss, other.val_loss)} it. "
            + ("Inheriting wins even" if better else "Plain longer training wins")
            + " when the reference has to be paid for."
        )
    if len([a for a in arms if a.arm == "inheritune"]) > 1:
        lines.append("Growth took more than one round; every round's tokens count in the pipeline's compute.")
    return lines


def write_report(out_dir, arms, target):
    """Write report.md, loss.png and results.json into out_dir, and return the report's text.

    arms: what was trained, the reference first; target: the reference's validation loss (nats/token).
    """
    curves = []
    shades = iter((0.35, 0.5, 0.65, 0.8) * 20)
    last = max(i for i, a in enumerate(arms) if a.arm == "inheritune")
    for i, a in enumerate(arms):
        tokens, losses = curve(os.path.join(out_dir, a.folder))
        if tokens:
            earlier = a.arm == "inheritune" and i != last
            curves.append((label(a), STYLES[a.arm] | ({"alpha": next(shades)} if earlier else {}), tokens, losses))
    plot_losses(os.path.join(out_dir, "loss.png"), curves, target, "Inheritune against its reference and its controls")
    ours = arms[last]
    results = {
        "runs": [dataclasses.asdict(a) for a in arms],
        "matched": ours.val_loss <= target,
        "k": ours.n_layer,
    }
    write_json(os.path.join(out_dir, "results.json"), results)
    picture = os.path.join(out_dir, "loss.png")
    text = f"# Inheritune\n\n{table(arms)}\n\n" + "\n\n".join(verdicts(arms, target)) + "\n"
    with replacing(os.path.join(out_dir, "report.md"), "w") as f:
        f.write(text + "\n![validation loss](loss.png)\n")
    return text + f"\nreport: {out_dir}/report.md   picture: {picture}   model: {out_dir}/final"
