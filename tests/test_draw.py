"""The paper's numbers, and ours over depth, as pictures. pytest tests/test_draw.py"""

import os
import shutil

from tests.tiny import ROOT, refusal
from tools import draw_depth, draw_paper

PNG = b"\x89PNG\r\n\x1a\n"


def test_paper_figure(tmp_path):
    shutil.copy(os.path.join(ROOT, "results/paper.csv"), tmp_path / "paper.csv")
    draw_paper.main([str(tmp_path / "paper.csv")])
    assert (tmp_path / "paper.png").read_bytes()[:8] == PNG
    assert "has columns" in refusal(draw_paper.main, [__file__])
    assert "holds no rows" in refusal(draw_paper.main, [tmp_path / "nowhere.csv"])


def test_depth_figure(tmp_path, monkeypatch):
    """The points are the rows of seed 1, by depth, whatever the order of the folders."""
    mini = os.path.join(ROOT, "results/mini")
    text = open(os.path.join(mini, "results.csv"), encoding="utf-8").read()
    lines = [line.split(",") for line in text.splitlines()]
    lines = [[*line[:9], "4", *line[10:]] if line[0] == "reference" else line for line in lines]
    (tmp_path / "results.csv").write_text("\n".join(map(",".join, lines)) + "\n")
    drawn = {}
    save = draw_depth.save
    monkeypatch.setattr(
        draw_depth, "save", lambda figure, path: (drawn.update(figure=figure), save(figure, path))
    )
    draw_depth.main([mini, str(tmp_path), "--out", str(tmp_path / "depth.png")])
    assert (tmp_path / "depth.png").read_bytes()[:8] == PNG
    wanted = [float(line[2]) for arm in draw_depth.ARMS for line in lines if line[:2] == [arm, "1"]]
    for axes_line, loss in zip(drawn["figure"].axes[0].lines, wanted, strict=True):
        assert list(axes_line.get_xdata()) == [4, 8]
        assert list(axes_line.get_ydata()) == [loss, loss]
    short = [line for line in lines if line[0] != "reference"]
    (tmp_path / "results.csv").write_text("\n".join(map(",".join, short)) + "\n")
    said = refusal(draw_depth.main, [mini, str(tmp_path), "--out", str(tmp_path / "depth.png")])
    assert "no row of seed 1 of reference" in said
