"""analyze.py: what it writes and what it refuses."""

import json

import pytest

import analyze
from inheritune.experiments.attention_metrics import draw_windows, measure_layers, skip_losses
from inheritune.models.open_model import load_model
from tests.tiny import write_checkpoint, write_data


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(checkpoint folder, data folder)."""
    folder = tmp_path_factory.mktemp("analyze")
    write_checkpoint(folder / "ckpt", block_size=16)
    return str(folder / "ckpt"), write_data(folder / "data", val=600)


def test_command_line(setting, tmp_path, capsys):
    ckpt, data = setting
    out = tmp_path / "out"
    flags = f"--ckpt {ckpt} --data {data} --sequences 9 --tau 0.9 0.5 --out {out}".split()
    flags += ["--device", "cpu", "--dtype", "float32"]
    analyze.main(flags)
    found = json.loads((out / "analysis.json").read_text())
    model = load_model(ckpt)
    idx, targets = draw_windows(data, "val", 9, 16, seed=1337)  # the model's context is shorter than 100
    assert (found["sequences"], found["length"], found["taus"]) == (9, 16, [0.9, 0.5])
    heads = measure_layers(model, idx, (0.9, 0.5))[0]
    assert found["heads"] == {name: values.tolist() for name, values in heads.items() if name != "rest"}
    layers = found["layers"]
    assert layers["max_rank"] == heads["rank_0.9"].amax(-1).tolist()
    assert layers["max_rank_0.5"] == heads["rank_0.5"].amax(-1).tolist()
    assert layers["avg_mass"] == heads["mass"].mean(-1).tolist()
    assert (found["loss"], layers["loss_without"]) == skip_losses(model, idx, targets)
    for name in ("rank.png", "maps.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    shown = capsys.readouterr().out
    assert "MaxRank" in shown and found["suggestion"]["reason"] in shown
    before = (out / "analysis.json").read_bytes()
    analyze.main(flags)
    assert (out / "analysis.json").read_bytes() == before

    # another dtype changes the losses without a block, slightly, and nothing else
    analyze.main([*flags, "--dtype", "bfloat16"])
    rough = json.loads((out / "analysis.json").read_text())
    assert [x.pop("loss_dtype") for x in (found, rough)] == ["float32", "bfloat16"]
    losses = [[*x["layers"].pop("loss_without"), x.pop("loss")] for x in (found, rough)]
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], abs=0.02)
    assert rough == found
