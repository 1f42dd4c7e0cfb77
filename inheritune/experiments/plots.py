"""The figures of train.py, of a comparison and of an analysis, in one style."""

import os
import statistics

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no screen needed

from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from inheritune.base.files import replacing
from inheritune.experiments.arms import OPTIMIZERS, find_arm
from inheritune.experiments.tables import best_variant, mean_and_error, mean_of, most_seeds_first
from inheritune.training.logs import read_rows

# Okabe and Ito's palette, which colour-blind readers can tell apart too
BLACK, BLUE, GREEN, RED, GREY = "#000000", "#0072B2", "#009E73", "#D55E00", "#9A9A9A"
# arms drawn in colour; the others are grey
COLOURS = {"reference": BLACK, "random": BLUE, "random_2x": "#56B4E9", "random_matched": GREEN}
COLOURS |= {"inheritune": RED, "ends": "#CC79A7", "onto": "#E69F00", "whole": "#5D5D5D"}
COLOURS |= {"influence": "#882255"}  # Paul Tol's: the palette's last one, yellow, is faint on white
LEVEL = {"color": BLACK, "linewidth": 0.8, "linestyle": ":"}
BASES = ("reference", "whole", "random", "inheritune", "ends", "influence")  # what plot_compute always shows
LOSS = "validation loss (nats/token)"

plt.rcParams.update({"figure.constrained_layout.use": True, "axes.axisbelow": True, "grid.alpha": 0.25})
plt.rcParams.update({"legend.fontsize": 8, "axes.titlesize": 10, "savefig.dpi": 150})


def save_figure(figure, path: str) -> None:
    """Write the figure as a PNG, atomically, and close it."""
    with replacing(path) as f:
        figure.savefig(f, format="png")
    plt.close(figure)


def finish_axes(axes, **texts) -> None:
    """Give axes their xlabel, ylabel and title, a grid and, if lines have labels, a legend."""
    axes.set(**texts)
    axes.grid()
    if axes.get_legend_handles_labels()[1]:
        axes.legend()


def zoom_loss_axis(axes, finals, below=0.1, above=1.2) -> None:
    """Limit the loss axis to where curves end, so that their ends can be told apart.

    finals: the last losses; below, above: room under and over them, in multiples of their spread.
    """
    spread = max(finals) - min(finals) or 0.1
    axes.set_ylim(min(finals) - below * spread, max(finals) + above * spread)


def plot_run(folder: str) -> None:
    """Plot the losses and the learning rate in a run folder's log.csv, as loss.png beside it."""
    rows = read_rows(os.path.join(folder, "log.csv"))
    figure, axes = plt.subplots(figsize=(8, 5))
    rate = axes.twinx()
    lines = {"loss": ("training", GREY, axes, "-"), "val_loss": ("validation", RED, axes, "o-")}
    lines |= {"also_val_loss": ("validation, second text", BLUE, axes, "o-")}
    lines |= {"lr": ("learning rate", GREEN, rate, ":")}
    for column, (label, colour, place, style) in lines.items():
        points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        if points:
            place.plot(*zip(*points, strict=True), style, markersize=3, color=colour, label=label)
    rate.set(ylabel="learning rate", ylim=(0, None))
    if rate.lines:  # none in a run that ended before its first step
        rate.legend(loc="lower left")
    finish_axes(axes, xlabel="step", ylabel="loss (nats/token)", title=os.path.basename(folder))
    save_figure(figure, os.path.join(folder, "loss.png"))


def mean_curve(curves):
    """(xs, mean, lowest, highest) of several seeds' curves over the same xs."""
    by_x = list(zip(*(ys for _, ys in curves), strict=False))  # a run may have stopped early
    low, high = [min(ys) for ys in by_x], [max(ys) for ys in by_x]
    return curves[0][0][: len(by_x)], [statistics.fmean(ys) for ys in by_x], low, high


def plot_points(axes, points) -> None:
    """Plot [(label, value, error or None, colour)] as dots with error bars, a line each, the first on top."""
    for i, (_, value, error, colour) in enumerate(reversed(points)):
        axes.errorbar(value, i, xerr=error or 0, fmt="o", markersize=4, capsize=2, color=colour)
    axes.set_yticks(range(len(points)), [label for label, *_ in reversed(points)], fontsize=7)
    axes.set_ylim(-0.7, len(points) - 0.3)
    axes.grid(axis="x")


def plot_comparison(path: str, arms: dict, curves: dict, title: str) -> None:
    """Plot loss over FLOPs of arms without changed settings (left), and all final losses (right)."""
    height = max(5.5, 0.9 + 0.17 * len(arms))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), width_ratios=(1.2, 1))

    # curves, of the arms without changed settings
    lines = {arm: mean_curve(curves[arm]) for arm in arms if curves[arm] and not arm.changes}
    for arm in sorted(lines, key=lambda arm: arm.base in COLOURS):  # the grey ones lie behind
        style = {"color": "#D0D0D0", "linewidth": 0.8}
        if arm.base in COLOURS:
            style = {"color": COLOURS[arm.base], "label": arm.label}
        left.plot(*lines[arm][:2], **style)
    reference = arms[find_arm("reference")]
    level = mean_of(reference, "curve_loss")  # may be measured on fewer tokens than the final losses
    zoom_loss_axis(left, [level, *(mean[-1] for _, mean, *_ in lines.values())], above=2.2)  # with the legend
    left.axhline(level, **LEVEL, label="the reference at its end")
    ylabel = f"{LOSS}, mean over seeds"
    finish_axes(left, xlabel="training FLOPs of the arm's own stages", ylabel=ylabel)

    # final losses
    points = []
    for arm, rows in arms.items():
        colour = COLOURS.get(arm.base, GREY)
        points.append((arm.label, *mean_and_error([r["val_loss"] for r in rows]), colour))
    plot_points(right, sorted(points, key=lambda p: p[1]))
    right.set(xlabel="final validation loss\n(mean and standard error over seeds)")
    right.axvline(mean_of(reference), **LEVEL)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_compute(path: str, arms: dict, curves: dict, title: str, optimizer: str) -> None:
    """Plot what starting from a trained reference gives: validation loss over a run's own training FLOPs, one
    panel for each optimizer. optimizer: of the arms that do not name another."""
    panels = compute_panels(arms, curves)
    n = len(panels)
    figure, places = plt.subplots(1, n, figsize=(7 * n, 5), squeeze=False, sharex=True, sharey=True)
    level = mean_of(arms[find_arm("reference")], "curve_loss")
    finals = [level]
    for axes, (name, shown) in zip(places.flat, panels.items(), strict=True):
        for arm in shown:
            xs, mean, low, high = mean_curve(curves[arm])
            colour = COLOURS.get(arm.base, GREEN)
            seeds = f"{len(curves[arm])} seed{'s' if len(curves[arm]) > 1 else ''}"
            axes.plot(xs, mean, color=colour, label=f"{arm.label} ({seeds})")
            axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
            finals.append(mean[-1])
        axes.axhline(level, **LEVEL, label="the given reference at its end")
        xlabel = "training FLOPs of the run itself, without the reference's"
        finish_axes(axes, xlabel=xlabel, title=OPTIMIZERS[name or optimizer])
    zoom_loss_axis(places[0, 0], finals)
    places[0, 0].set_ylabel(f"{LOSS}\nmean over seeds, band from lowest to highest")
    figure.suptitle(f"{title}: given a trained reference")
    save_figure(figure, path)


def compute_panels(arms: dict, curves: dict) -> dict:
    """{optimizer: arms to show}: the best variants of BASES, and the best small model that starts from the
    reference. A second optimizer gets a panel if it has such an arm."""
    panels = {}
    for optimizer in dict.fromkeys(arm.changes.get("optimizer") for arm in arms):
        shown = [best_variant(arms, base, optimizer) for base in BASES]
        recipes = [
            arm
            for arm in arms
            if arm.from_reference
            and arm.base != "whole"
            and arm.changes.get("optimizer") == optimizer
            and "max_iters" not in arm.changes
            and curves[arm]
        ]
        shown.append(min(recipes, key=lambda arm: most_seeds_first(arms[arm]), default=None))
        if recipes or optimizer is None:
            panels[optimizer] = list(dict.fromkeys(arm for arm in shown if arm and curves[arm]))
    return panels


def plot_analysis(path: str, found: dict, title: str) -> None:
    """Plot an analysis (a dict as from `analyse`): rank of each head, and MaxRank and AvgMass by depth."""
    tau, layers = found["taus"][0], found["layers"]
    ranks = np.array(found["heads"][f"rank_{tau:g}"])  # (n_layer, n_head)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    # heads
    scale = LogNorm(1, max(2, ranks.max()))  # most of what there is to see lies between 1 and 5
    image = left.imshow(ranks.T, aspect="auto", origin="lower", norm=scale, interpolation="none")
    left.set(xlabel="layer", ylabel="head", title="mean rank of each head")
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if t <= scale.vmax]
    figure.colorbar(image, ax=left, ticks=ticks)
    image.colorbar.ax.yaxis.set_major_formatter(ScalarFormatter())
    image.colorbar.ax.minorticks_off()
    # layers
    right.axhline(1, **LEVEL)
    right.plot(layers["max_rank"], "o-", markersize=4, color=RED, label=f"MaxRank (tau {tau:g})")
    right.plot(layers["avg_mass"], "s-", markersize=4, color=BLUE, label=f"AvgMass (eta {found['eta']:g})")
    lazy = f"{found['lazy_layers']} of {len(ranks)} layers lazy, at {found['length']} tokens"
    finish_axes(right, xlabel="layer", ylim=(0, None), title=lazy)
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    save_figure(figure, path)


def plot_maps(path: str, maps: dict) -> None:
    """Plot attention maps, {(layer, head): (T, T) array}, on a scale that shows small probabilities too."""
    columns = min(6, len(maps))
    rows = -(-len(maps) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(max(4, 2 * columns), 2.2 * rows), squeeze=False)
    for place in axes.flat:
        place.axis("off")
    for place, ((layer, head), A) in zip(axes.flat, maps.items(), strict=False):
        image = place.imshow(A, cmap="magma", norm=PowerNorm(0.5, 0, 1), interpolation="none")
        place.set_title(f"layer {layer}, head {head}", fontsize=8)
    figure.colorbar(image, ax=axes, label="attention probability", shrink=0.7)
    save_figure(figure, path)
