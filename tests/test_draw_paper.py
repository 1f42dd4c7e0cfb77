"""The paper's numbers as a picture. pytest tests/test_draw_paper.py"""

import os
import shutil

from tests.tiny import ROOT, refusal
from tools import draw_paper


def test_paper_figure(tmp_path):
    shutil.copy(os.path.join(ROOT, "results/paper.csv"), tmp_path / "paper.csv")
    draw_paper.main([str(tmp_path / "paper.csv")])
    assert (tmp_path / "paper.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "has columns" in refusal(draw_paper.main, [__file__])
    assert "holds no rows" in refusal(draw_paper.main, [tmp_path / "nowhere.csv"])
