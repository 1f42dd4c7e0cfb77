"""The figures and correlations that tools/ makes of committed results."""

import os
import shutil

import numpy as np
import pytest

from inheritune.base.files import write_json
from tests.tiny import ROOT, refusal
from tools import plot_depth, plot_head_start, plot_paper, plot_tokens
from tools.correlate_measures import ranks, spearman

PNG = b"\x89PNG\r\n\x1a\n"


def test_paper_figure(tmp_path):
    shutil.copy(os.path.join(ROOT, "results/paper.csv"), tmp_path / "paper.csv")
    plot_paper.main([str(tmp_path / "paper.csv")])
    assert (tmp_path / "paper.png").read_bytes()[:8] == PNG
    assert "holds no rows" in refusal(plot_paper.main, [__file__])
    assert "holds no rows" in refusal(plot_paper.main, [tmp_path / "nowhere.csv"])


def test_depth_figure(tmp_path, monkeypatch):
    """The points are the rows of seed 1, by depth, whatever the order of the folders."""
    mini = os.path.join(ROOT, "results/mini")
    text = open(os.path.join(mini, "results.csv"), encoding="utf-8").read()
    lines = [line.split(",") for line in text.splitlines()]
    lines = [[*line[:9], "4", *line[10:]] if line[0] == "reference" else line for line in lines]
    (tmp_path / "results.csv").write_text("\n".join(map(",".join, lines)) + "\n")
    drawn = []
    monkeypatch.setattr(plot_depth, "save_figure", lambda figure, path: drawn.append(figure))
    plot_depth.main([mini, str(tmp_path), "--out", str(tmp_path / "depth.png")])
    wanted = [float(line[2]) for arm in plot_depth.ARMS for line in lines if line[:2] == [arm, "1"]]
    for axes_line, loss in zip(drawn[0].axes[0].lines, wanted, strict=True):
        assert list(axes_line.get_xdata()) == [4, 8]
        assert list(axes_line.get_ydata()) == [loss, loss]
    short = [line for line in lines if line[0] != "reference"]
    (tmp_path / "results.csv").write_text("\n".join(map(",".join, short)) + "\n")
    said = refusal(plot_depth.main, [mini, str(tmp_path), "--out", str(tmp_path / "depth.png")])
    assert "no row of seed 1 of reference" in said


def test_tokens_figure(tmp_path, capsys):
    """An arm of two runs is one curve; a text that a run did not measure has no line."""
    logs = tmp_path / "logs" / "seed_1"
    runs = {
        "reference": (2.0, []),
        "random": (4.0, ["step,tokens,val_loss,also_val_loss\n0,0,9,8\n5,,,\n9,51200,4,5\n"]),
        "onto": (3.0, ["step,tokens,val_loss\n0,0,7\n9,51200,5\n", "step,tokens,val_loss\n9,51200,3\n"]),
    }
    for arm, (loss, texts) in runs.items():
        (logs / arm).mkdir(parents=True)
        write_json(logs / arm / "row.json", {"arm": arm, "seed": 1, "curve_loss": loss})
        for i, text in enumerate(texts):
            (logs / arm / f"round_{i}").mkdir()
            (logs / arm / f"round_{i}" / "log.csv").write_text(text)
    plot_tokens.main([str(tmp_path)])
    assert (tmp_path / "tokens.png").read_bytes()[:8] == PNG
    first, second = capsys.readouterr().out.split("On the second text")
    assert "| growth onto the trained model | 7.000 | 5.000 | 3.000 |" in first
    assert "| random init | 9.000 | 4.000 |  |" in first
    assert "| random init | 8.000 | 5.000 |" in second and "growth" not in second
    shutil.rmtree(logs / "reference")
    assert "lacks a reference's row" in refusal(plot_tokens.main, [tmp_path])


def test_head_start(tmp_path):
    """Random init loses 1 nat with each doubling; what differs in more than the steps does not count."""
    rows = [("random@max_iters=100", 4, 100), ("random", 3, 200), ("random_2x", 2, 400)]
    rows += [("inheritune", 2.5, 200), ("inheritune@max_iters=100", 1, 100)]
    rows += [("inheritune@max_iters=400@optimizer=muon", 2, 400)]
    lines = ["arm,seed,val_loss,steps", *(f"{arm},1,{loss},{steps}" for arm, loss, steps in rows)]
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    found = plot_head_start.head_starts(str(tmp_path))
    assert [row[:4] for row in found] == [(1, 100, 4, 1), (1, 200, 3, 2.5)]
    assert found[0][4] is None and found[1][4] == pytest.approx(200 * 2**0.5)
    plot_head_start.main([str(tmp_path)])
    assert (tmp_path / "head_start.png").read_bytes()[:8] == PNG
    assert "| 1 | 200 | 2.5000 | -0.5000 | -100 | 283, 83 more |" in (tmp_path / "head_start.md").read_text()
    (tmp_path / "results.csv").write_text("arm,seed,val_loss,steps\n")
    assert "needs rows of random and of inheritune" in refusal(plot_head_start.main, [tmp_path])


def test_spearman():
    assert ranks(np.array([3, 1, 1, 7])).tolist() == [2, 0.5, 0.5, 3], "they share ties"
    x = np.array([1.0, 2, 3, 4, 5])
    rho, p = spearman(x, np.array([1.0, 4, 9, 16, 25]))
    assert rho == pytest.approx(1) and p == pytest.approx(2 / 120, abs=0.002)
    assert spearman(x, -x)[0] == pytest.approx(-1)
    # 1 − 6 Σd² / (n (n² − 1)), d = 1, 1, 0, 1, 1
    assert spearman(x, np.array([2.0, 1, 3, 5, 4]))[0] == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman(x, np.ones(5)) == (0, 1)
