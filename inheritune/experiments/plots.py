"""Figures: of runs, drawn from their log.csv, and of an analysis."""

import os

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no screen needed

from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from inheritune.base.files import replacing
from inheritune.training.logs import read_rows


def curve(run_folder):
    """(tokens, validation losses) of a run folder's log.csv, two lists of floats of equal length."""
    rows = [r for r in read_rows(os.path.join(run_folder, "log.csv")) if r["val_loss"]]
    return [float(r["tokens"]) for r in rows], [float(r["val_loss"]) for r in rows]


def save(figure, path):
    """Write the figure as a PNG, atomically, and close it."""
    with replacing(path) as f:
        figure.savefig(f, format="png", dpi=150)
    plt.close(figure)


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
    save(figure, path)


def draw_points(axes, points):
    """Draw [(label, value, standard error or None, colour)] as dots with bars, one line for each, the first on top."""
    for i, (_, value, error, colour) in enumerate(reversed(points)):
        axes.errorbar(value, i, xerr=error or 0, fmt="o", markersize=4, capsize=2, color=colour)
    axes.set_yticks(range(len(points)), [label for label, *_ in reversed(points)], fontsize=7)
    axes.grid(alpha=0.25, axis="x")


def plot_comparison(path, curves, points, reference_loss, title):
    """Draw an arm's validation loss over its own training FLOPs (left), and the final losses (right).

    curves: [(label, colour, FLOPs, losses)], label None for those that only stand in the background; points as for
    `draw_points`. The left axis is cut above the worst final loss so that the ends can be told apart.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained", width_ratios=(1.2, 1))
    for label, colour, flops, losses in sorted(curves, key=lambda c: c[0] is not None):
        shown = {"color": colour, "label": label} if label else {"color": "lightgray", "linewidth": 0.8}
        left.plot(flops, losses, **shown)
    finals = [losses[-1] for *_, losses in curves]
    spread = max(finals) - min(finals) or 0.1
    left.set_ylim(min(finals) - 0.1 * spread, max(finals) + 1.2 * spread)
    left.set(xlabel="training FLOPs of the arm's own stages", ylabel="validation loss (nats/token)")
    left.grid(alpha=0.25)
    left.legend(fontsize=8)
    draw_points(right, points)
    right.set(xlabel="final validation loss, mean and standard error over seeds")
    for axes, line in ((left, left.axhline), (right, right.axvline)):
        line(reference_loss, color="black", linewidth=0.8, linestyle=":")
        axes.set_axisbelow(True)
    figure.suptitle(title)
    save(figure, path)


def plot_point_panels(path, panels, title):
    """Draw panels [(title, xlabel, points)] side by side, points as for `draw_points`."""
    columns = min(3, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [0.9 + 0.22 * max(len(points) for *_, points in row) for row in rows]
    size = (6 * columns, 0.4 + sum(heights))
    shape = {"squeeze": False, "height_ratios": heights, "layout": "constrained"}
    figure, axes = plt.subplots(len(rows), columns, figsize=size, **shape)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    for place, (name, xlabel, points) in zip(axes.flat, panels, strict=False):
        draw_points(place, points)
        place.set_title(name, fontsize=10)
        place.set_xlabel(xlabel, fontsize=8)
        place.tick_params(axis="x", labelsize=8)
    figure.suptitle(title)
    save(figure, path)


def plot_ranks(path, panels, title):
    """Draw MaxRank by depth, one panel for each [(title, before, after)], lists over layers; before may be None."""
    columns = min(5, len(panels))
    rows = -(-len(panels) // columns)
    size = (2.6 * columns, 1.9 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    for place, (name, before, after) in zip(axes.flat, panels, strict=False):
        place.axhline(1, color="black", linewidth=0.8, linestyle=":")
        if before is not None:
            place.plot(before, ".--", color="tab:gray", linewidth=1, label="before training")
        place.plot(after, "o-", color="tab:red", markersize=3, linewidth=1.2, label="after")
        place.set_title(name, fontsize=7)
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
        place.grid(alpha=0.25)
    axes.flat[0].set_ylim(0, 1.05 * max(max((before or []) + after) for _, before, after in panels))  # shared by all
    axes.flat[0].legend(fontsize=7)
    figure.supxlabel("layer")
    figure.supylabel("MaxRank")
    figure.suptitle(title)
    save(figure, path)


def plot_analysis(path, found, title):
    """Draw an analysis (a dict as from analyze.analyse): rank of each head, and MaxRank and AvgMass by depth."""
    tau, layers = found["taus"][0], found["layers"]
    ranks = np.array(found["heads"][f"rank_{tau:g}"])  # (n_layer, n_head)
    depth = np.arange(len(ranks))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    scale = LogNorm(1, max(2, ranks.max()))  # most of what there is to see lies between 1 and 5
    image = left.imshow(ranks.T, aspect="auto", origin="lower", cmap="viridis", norm=scale, interpolation="none")
    left.set(xlabel="layer", ylabel="head", title="mean rank of each head")
    figure.colorbar(image, ax=left, ticks=[t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if t <= scale.vmax])
    image.colorbar.ax.yaxis.set_major_formatter(ScalarFormatter())
    image.colorbar.ax.minorticks_off()
    right.axhline(1, color="black", linewidth=0.8, linestyle=":")
    right.plot(depth, layers["max_rank"], "o-", markersize=4, color="tab:red", label=f"MaxRank (tau {tau:g})")
    right.plot(depth, layers["avg_mass"], "s-", markersize=4, color="tab:blue", label=f"AvgMass (eta {found['eta']:g})")
    lazy = f"{found['lazy_layers']} of {len(ranks)} layers lazy, at {found['length']} tokens"
    right.set(xlabel="layer", ylim=(0, None), title=lazy)
    right.grid(alpha=0.25)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    save(figure, path)


def plot_maps(path, maps):
    """Draw attention maps, {(layer, head): (T, T) array}, on a scale that shows small probabilities too."""
    columns = min(6, len(maps))
    rows = -(-len(maps) // columns)
    size = (max(4, 2 * columns), 2.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for place in axes.flat:
        place.axis("off")
    for place, ((layer, head), A) in zip(axes.flat, maps.items(), strict=False):
        image = place.imshow(A, cmap="magma", norm=PowerNorm(0.5, 0, 1), interpolation="none")
        place.set_title(f"layer {layer}, head {head}", fontsize=8)
    figure.colorbar(image, ax=axes, label="attention probability", shrink=0.7)
    save(figure, path)
