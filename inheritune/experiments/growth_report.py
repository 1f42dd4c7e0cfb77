"""What grow.py leaves: report.md, loss.png and results.json. A row is one run, as grow.run_row makes it."""

import math
import os

from matplotlib import pyplot as plt

from inheritune.base.files import replacing, write_json
from inheritune.experiments.plots import COLOURS, LEVEL, LOSS, finish_axes, save_figure, zoom_loss_axis
from inheritune.experiments.tables import average, markdown
from inheritune.training.logs import loss_curve


def write_growth_report(out_dir: str, rows: list[dict]) -> str:
    """Write report.md, loss.png and results.json into out_dir, and return the report's text.

    rows: as of run_row, the reference first.
    """
    last = max(i for i, row in enumerate(rows) if row["arm"] == "inheritune")
    target, ours = rows[0]["val_loss"], rows[last]
    curves = []
    for i, row in enumerate(rows):
        tokens, losses = loss_curve(os.path.join(out_dir, row["folder"]))
        if tokens:
            alpha = 0.5 if row["arm"] == "inheritune" and i != last else 1.0  # earlier rounds are paler
            curves.append((growth_label(row), row["arm"], alpha, tokens, losses))
    title = "Inheritune against its reference and its controls"
    plot_growth(os.path.join(out_dir, "loss.png"), curves, target, title)
    results = {"runs": rows, "matched": ours["val_loss"] <= target, "k": ours["n_layer"]}
    write_json(os.path.join(out_dir, "results.json"), results)
    text = f"# Inheritune\n\n{growth_table(rows)}\n\n{verdict(ours, rows[0])}\n"
    with replacing(os.path.join(out_dir, "report.md"), "w") as f:
        f.write(text + "\n![validation loss](loss.png)\n")
    return text + f"\nreport: {out_dir}/report.md   picture: {out_dir}/loss.png   model: {out_dir}/final"


def plot_growth(path: str, curves, reference_loss: float, title: str) -> None:
    """Plot grow.py's runs, [(label, arm, alpha, tokens, losses)]: validation loss over training tokens."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for label, arm, alpha, tokens, losses in curves:
        style = {"color": COLOURS[arm], "alpha": alpha}
        axes.plot(tokens, losses, label=f"{label}: {losses[-1]:.3f}", **style)
        axes.plot(tokens[-1], losses[-1], "o", markersize=4, **style)
    axes.axhline(reference_loss, **LEVEL, label="the reference at its end")
    zoom_loss_axis(axes, [losses[-1] for *_, losses in curves] + [reference_loss], 0.3, 2.5)
    finish_axes(axes, xlabel="training tokens of the run itself", ylabel=LOSS, title=title)
    save_figure(figure, path)


def growth_label(row: dict) -> str:
    """The name of one of grow.py's rows in tables and legends: 'random init, as many steps, 6 blocks'."""
    names = {"random": "random init, as many steps"}
    names |= {"random_matched": "random init, compute of the whole pipeline"}
    return f"{names.get(row['arm'], row['arm'])}, {row['n_layer']} blocks"


def growth_table(rows: list[dict]) -> str:
    """grow.py's rows as a Markdown table; '–' is a number of tokens or FLOPs that is unknown."""
    columns = ["model", "parameters", "training tokens", "training FLOPs", "validation loss", "perplexity"]
    lines = []
    for r in rows:
        trained = average([r["tokens"]], ",.0f"), average([r["flops"]], ".3g")
        losses = f"{r['val_loss']:.4f}", f"{math.exp(r['val_loss']):.3f}"
        lines.append([growth_label(r), f"{r['params']:,}", *trained, *losses])
    return markdown(columns, lines)


def verdict(ours: dict, reference: dict) -> str:
    """Whether grow.py's small model has matched the reference, as a sentence. ours, reference: their rows."""
    gap, share = ours["val_loss"] - reference["val_loss"], ours["params"] / reference["params"]
    small = f"{ours['n_layer']} of its {reference['n_layer']} blocks ({share:.0%} of the parameters)"
    end = f"{abs(gap):.4f} {'below' if gap <= 0 else 'above'} its loss"
    matched = "matched." if gap <= 0 else "not matched, at the deepest size tried."
    return f"Against the reference: {small} end {end}: {matched}"
