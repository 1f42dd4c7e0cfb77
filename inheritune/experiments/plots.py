"""Every figure, in one style: of a recipe, a comparison, an analysis. Functions draw what they are given."""

import os
import statistics
import textwrap

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no screen needed

from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from inheritune.base.files import replacing
from inheritune.experiments.arms import OPTIMIZERS, find_arm, split_name
from inheritune.experiments.tables import (
    LONGER,
    SCHEDULE,
    best_variant,
    by_arm,
    mean_and_error,
    mean_loss,
    order,
)

# Okabe and Ito's palette: told apart by colour-blind readers too
BLACK, BLUE, GREEN, RED, GREY = "#000000", "#0072B2", "#009E73", "#D55E00", "#9A9A9A"
# of the arms that the question is about; the others are grey
COLOURS = {"reference": BLACK, "random": BLUE, "random_2x": "#56B4E9", "random_matched": GREEN}
COLOURS |= {"inheritune": RED, "ends": "#CC79A7", "onto": "#E69F00"}
LEVEL = {"color": BLACK, "linewidth": 0.8, "linestyle": ":"}
STYLES = {"adamw": "-", "muon": "--"}

plt.rcParams.update({"figure.constrained_layout.use": True, "axes.axisbelow": True, "grid.alpha": 0.25})
plt.rcParams.update({"legend.fontsize": 8, "axes.titlesize": 10, "savefig.dpi": 150})


def save(figure, path: str) -> None:
    """Write the figure as a PNG, atomically, and close it."""
    with replacing(path) as f:
        figure.savefig(f, format="png")
    plt.close(figure)


def cut(axes, finals, below=0.1, above=1.2) -> None:
    """Limit the loss axis to where curves end, so that the ends can be told apart."""
    spread = max(finals) - min(finals) or 0.1
    axes.set_ylim(min(finals) - below * spread, max(finals) + above * spread)


def plot_growth(path: str, curves, reference_loss: float, title: str) -> None:
    """Draw grow.py's runs, [(label, arm, alpha, tokens, losses)]: validation loss over training tokens."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for label, arm, alpha, tokens, losses in curves:
        how = {"color": COLOURS[arm], "alpha": alpha}
        axes.plot(tokens, losses, label=f"{label}: {losses[-1]:.3f}", **how)
        axes.plot(tokens[-1], losses[-1], "o", markersize=4, **how)
    axes.axhline(reference_loss, **LEVEL, label="the reference at its end")
    cut(axes, [losses[-1] for *_, losses in curves] + [reference_loss], 0.3, 2.5)
    axes.set(xlabel="training tokens of the run itself", ylabel="validation loss (nats/token)", title=title)
    axes.grid()
    axes.legend()
    save(figure, path)


def plot_results(folder: str, rows: list[dict], curves, optimizer: str) -> list[str]:
    """Write replicate.py's figures into `folder` and return their names. rows: as in row.json; curves: for
    each row (FLOPs, losses); optimizer: of the arms that do not name another."""
    title = os.path.basename(os.path.normpath(folder))
    arms = by_arm(rows)
    drawn = {arm: [c for r, c in zip(rows, curves, strict=True) if r["arm"] == arm and c[0]] for arm in arms}
    figures = {
        "curves.png": lambda path: plot_comparison(path, arms, drawn, title),
        "compute.png": lambda path: plot_compute(path, arms, drawn, title, optimizer),
        "rank.png": lambda path: plot_ranks(path, arms, title),
    }
    if budgets(arms):
        figures["budget.png"] = lambda path: plot_budget(path, arms, title, optimizer)
    for name, draw in figures.items():
        draw(os.path.join(folder, name))
    return list(figures)


def mean_curve(curves):
    """(xs, mean, lowest, highest) of several seeds' curves over the same xs."""
    by_x = list(zip(*(ys for _, ys in curves), strict=False))  # a run may have stopped early
    low, high = [min(ys) for ys in by_x], [max(ys) for ys in by_x]
    return curves[0][0][: len(by_x)], [statistics.fmean(ys) for ys in by_x], low, high


def plot_points(axes, points) -> None:
    """Draw [(label, value, error or None, colour)] as dots with bars, one line for each, the first on top."""
    for i, (_, value, error, colour) in enumerate(reversed(points)):
        axes.errorbar(value, i, xerr=error or 0, fmt="o", markersize=4, capsize=2, color=colour)
    axes.set_yticks(range(len(points)), [label for label, *_ in reversed(points)], fontsize=7)
    axes.set_ylim(-0.7, len(points) - 0.3)
    axes.grid(axis="x")


def plot_comparison(path: str, arms: dict, drawn: dict, title: str) -> None:
    """Draw every arm's validation loss over its own training FLOPs (left), and the final losses (right)."""
    height = max(5.5, 0.9 + 0.17 * len(arms))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), width_ratios=(1.2, 1))
    lines = {arm: mean_curve(curves) for arm, curves in drawn.items() if curves and "@" not in arm}
    for arm in sorted(lines, key=lambda arm: arm in COLOURS):  # the grey ones behind
        known = {"color": COLOURS.get(arm), "label": find_arm(arm).label}
        left.plot(*lines[arm][:2], **(known if arm in COLOURS else {"color": "#D0D0D0", "linewidth": 0.8}))
    cut(left, [mean[-1] for _, mean, *_ in lines.values()] or [0.0], above=2.2)  # room for the legend
    left.set_xlabel("training FLOPs of the arm's own stages")
    left.set_ylabel("validation loss (nats/token), mean over seeds")
    left.axhline(curve_level(arms), **LEVEL, label="the reference at its end")
    left.grid()
    left.legend()
    points = []
    for arm, rows in arms.items():
        colour = COLOURS.get(split_name(arm)[0], GREY)
        points.append((find_arm(arm).label, *mean_and_error([r["val_loss"] for r in rows]), colour))
    plot_points(right, sorted(points, key=lambda p: p[1]))
    right.set(xlabel="final validation loss\n(mean and standard error over seeds)")
    right.axvline(mean_loss(arms["reference"]), **LEVEL)
    figure.suptitle(title)
    save(figure, path)


def curve_level(arms: dict) -> float:
    """The reference's last loss on its curve, which may be measured on fewer tokens than its final loss."""
    return statistics.fmean(r["curve_loss"] for r in arms["reference"])


def plot_compute(path: str, arms: dict, drawn: dict, title: str, own: str) -> None:
    """Draw what starting from a trained reference gives: validation loss over a run's own training FLOPs, one
    panel for each optimizer. own: the optimizer of the arms that do not name another."""
    panels = compute_panels(arms, drawn)
    n = len(panels)
    figure, places = plt.subplots(1, n, figsize=(7 * n, 5), squeeze=False, sharey=True)
    level, finals = curve_level(arms), [curve_level(arms)]
    for axes, (optimizer, shown) in zip(places.flat, panels.items(), strict=True):
        for arm in shown:
            xs, mean, low, high = mean_curve(drawn[arm])
            colour = COLOURS.get(split_name(arm)[0], GREEN)
            seeds = f"{len(drawn[arm])} seed{'s' if len(drawn[arm]) > 1 else ''}"
            axes.plot(xs, mean, color=colour, label=f"{find_arm(arm).label} ({seeds})")
            axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
            finals.append(mean[-1])
        axes.axhline(level, **LEVEL, label="the given reference at its end")
        axes.set(xlabel="training FLOPs of the run itself, the reference being there")
        axes.set_title(OPTIMIZERS[optimizer or own])
        axes.grid()
        axes.legend()
    cut(places[0, 0], finals)
    places[0, 0].set_ylabel("validation loss (nats/token)\nmean over seeds, band from lowest to highest")
    figure.suptitle(f"{title}: given a trained reference")
    save(figure, path)


def compute_panels(arms: dict, drawn: dict) -> dict:
    """{optimizer: arms to show}: reference, random init, Inheritune and `ends`, of several learning rates
    `order`'s first, and the best other arm that starts from the reference where it ends below these two."""
    panels = {}
    for optimizer in dict.fromkeys(split_name(arm)[1].get("optimizer") for arm in arms):
        bases = ("reference", "random", "inheritune", "ends")
        shown = [best_variant(arms, base, optimizer) for base in bases]
        recipes = [arm for arm in arms if drawn[arm] and is_recipe(arm, optimizer)]
        shown.append(min(recipes, key=lambda arm: order(arms[arm]), default=None))
        if recipes or optimizer is None:
            panels[optimizer] = list(dict.fromkeys(arm for arm in shown if arm and drawn[arm]))
    return panels


def is_recipe(arm: str, optimizer: str | None) -> bool:
    """Whether an arm starts or learns from the reference, under this optimizer, for the usual steps."""
    changed = split_name(arm)[1]
    same = changed.get("optimizer") == optimizer and "max_iters" not in changed
    return same and find_arm(arm).source == "reference"


def budgets(arms: dict) -> dict:
    """{(base, optimizer): {steps: best arm}} of all that were trained for several numbers of steps."""
    found = {}
    for arm in arms:
        base, changed = split_name(arm)
        if set(changed) <= {"max_iters", "optimizer", *SCHEDULE} and base != "reference":
            optimizer, steps = changed.get("optimizer"), arms[arm][0]["steps"]
            longer = base in LONGER or "max_iters" in changed
            base = LONGER.get(base, base)
            best = best_variant(arms, base, optimizer, steps if longer else None)
            found.setdefault((base, optimizer), {})[steps] = best
    return {key: dict(sorted(by_steps.items())) for key, by_steps in found.items() if len(by_steps) > 1}


def plot_budget(path: str, arms: dict, title: str, own: str) -> None:
    """Draw final loss over training steps, each point a run with a schedule of its own."""
    figure, axes = plt.subplots(figsize=(8, 5))
    found = budgets(arms)
    for (base, optimizer), by_steps in found.items():
        points = [mean_and_error([r["val_loss"] for r in arms[arm]]) for arm in by_steps.values()]
        means, errors = [mean for mean, _ in points], [error or 0 for _, error in points]
        how = {"color": COLOURS.get(base, GREY), "linestyle": STYLES[optimizer or own]}
        how["label"] = f"{find_arm(base).label}, {OPTIMIZERS[optimizer or own]}"
        axes.errorbar(list(by_steps), means, errors, marker="o", markersize=4, capsize=3, **how)
    # levels of the references
    for optimizer in dict.fromkeys(optimizer for _, optimizer in found):
        if arm := best_variant(arms, "reference", optimizer):
            label = f"reference at its end, {OPTIMIZERS[optimizer or own]}"
            how = LEVEL | {"linestyle": STYLES[optimizer or own], "label": label}
            axes.axhline(mean_loss(arms[arm]), **how)
    ticks = sorted({steps for by_steps in found.values() for steps in by_steps})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{steps:,}" for steps in ticks])
    axes.minorticks_off()
    axes.set_xlabel("training steps, each point a run of its own")
    axes.set_ylabel("final validation loss (nats/token)")
    axes.set_title(f"{title}: mean and standard error over seeds; a point without an error is of one seed")
    axes.grid()
    axes.legend()
    save(figure, path)


def mean_ranks(rows, key):
    """MaxRank by depth, averaged over seeds; [] where it is not known."""
    lists = [r[key] for r in rows]
    return [] if None in lists else [statistics.fmean(layer) for layer in zip(*lists, strict=True)]


def plot_ranks(path: str, arms: dict, title: str) -> None:
    """Draw MaxRank by depth before and after training, one panel for each arm but those of other lengths."""
    shown = [arm for arm in arms if set(split_name(arm)[1]) <= {"optimizer"}]
    columns, highest = min(5, len(shown)), 0.0
    rows = -(-len(shown) // columns)
    size = 2.6 * columns, 2.0 * rows + 0.6
    figure, places = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    for place in places.flat[len(shown) :]:
        place.axis("off")
    for place, arm in zip(places.flat, shown, strict=False):
        before, after = mean_ranks(arms[arm], "ranks_before"), mean_ranks(arms[arm], "ranks_after")
        highest = max(highest, *before, *after)
        place.axhline(1, **LEVEL)
        if before:
            place.plot(before, ".--", color=GREY, linewidth=1, label="before training")
        place.plot(after, "o-", color=RED, markersize=3, linewidth=1.2, label="after")
        place.set_title(textwrap.fill(find_arm(arm).label, 36), fontsize=7)
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
        place.grid()
    places.flat[0].set_ylim(0, 1.05 * highest)  # shared by all
    handles, labels = place.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    figure.supxlabel("layer", fontsize=9)
    figure.supylabel("MaxRank", fontsize=9)
    figure.suptitle(f"{title}: MaxRank by depth", fontsize=10)
    save(figure, path)


def plot_point_panels(path: str, panels, title: str) -> None:
    """Draw panels [(title, xlabel, points)] side by side, points as for `plot_points`."""
    columns = min(3, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [0.9 + 0.22 * max(len(points) for *_, points in row) for row in rows]
    shape = {"squeeze": False, "height_ratios": heights, "figsize": (6 * columns, 0.4 + sum(heights))}
    figure, axes = plt.subplots(len(rows), columns, **shape)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    for place, (name, xlabel, points) in zip(axes.flat, panels, strict=False):
        plot_points(place, points)
        place.set_title(name)
        place.set_xlabel(xlabel, fontsize=8)
        place.tick_params(axis="x", labelsize=8)
    figure.suptitle(title)
    save(figure, path)


def plot_analysis(path: str, found: dict, title: str) -> None:
    """Draw an analysis (a dict as from `analyse`): rank of each head, and MaxRank and AvgMass by depth."""
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
    right.set(xlabel="layer", ylim=(0, None), title=lazy)
    right.grid()
    right.legend()
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    save(figure, path)


def plot_maps(path: str, maps: dict) -> None:
    """Draw attention maps, {(layer, head): (T, T) array}, on a scale that shows small probabilities too."""
    columns = min(6, len(maps))
    rows = -(-len(maps) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(max(4, 2 * columns), 2.2 * rows), squeeze=False)
    for place in axes.flat:
        place.axis("off")
    for place, ((layer, head), A) in zip(axes.flat, maps.items(), strict=False):
        image = place.imshow(A, cmap="magma", norm=PowerNorm(0.5, 0, 1), interpolation="none")
        place.set_title(f"layer {layer}, head {head}", fontsize=8)
    figure.colorbar(image, ax=axes, label="attention probability", shrink=0.7)
    save(figure, path)
