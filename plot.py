"""Figures of runs, drawn from their log.csv."""

import os

import matplotlib

matplotlib.use("Agg")  # no screen needed

from matplotlib import pyplot as plt

from files import replacing
from log import read_rows


def curve(run_folder):
    """(tokens, validation losses) of a run folder's log.csv, two lists of floats of equal length."""
    rows = [r for r in read_rows(os.path.join(run_folder, "log.csv")) if r["val_loss"]]
    return [float(r["tokens"]) for r in rows], [float(r["val_loss"]) for r in rows]


def plot_losses(path, curves, reference_loss, title):
    """Draw validation loss over training tokens and save it as a PNG.

    curves: [(label, style, tokens, losses)], style being keyword arguments of matplotlib's plot; reference_loss: a
    float drawn as a level line. The axis is cut above the worst final loss so that the ends can be told apart.
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for label, style, tokens, losses in curves:
        axes.plot(tokens, losses, label=f"{label}: {losses[-1]:.3f}", **style)
        axes.plot(tokens[-1], losses[-1], "o", markersize=4, color=style.get("color"))
    axes.axhline(reference_loss, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("reference, final", (axes.get_xlim()[1], reference_loss), ha="right", va="bottom", fontsize=8)
    finals = [losses[-1] for *_, losses in curves] + [reference_loss]
    spread = max(finals) - min(finals) or 0.1
    axes.set_ylim(min(finals) - 0.3 * spread, max(finals) + 2.5 * spread)
    axes.set(xlabel="training tokens of the run itself", ylabel="validation loss (nats/token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    with replacing(path) as f:
        figure.savefig(f, format="png", dpi=150)
    plt.close(figure)
