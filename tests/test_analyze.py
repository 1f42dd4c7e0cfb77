"""analyze.py: what it writes and what it refuses. python -m pytest tests/test_analyze.py"""

import json
import os

import pytest

import analyze
from inheritune.experiments.attention_metrics import draw_windows, max_rank, measure_layers, skip_losses
from inheritune.weights import checkpoint
from model import GPT
from tests.tiny import gpt2, refusal, tiny_model, write_checkpoint, write_data


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(checkpoint folder, data folder)."""
    folder = tmp_path_factory.mktemp("analyze")
    write_checkpoint(folder / "ckpt", block_size=16)
    return str(folder / "ckpt"), write_data(folder / "data", val=600)


def test_command_line(setting, tmp_path, capsys):
    ckpt, data = setting
    out = tmp_path / "out"
    flags = (
        f"--ckpt {ckpt} --data {data} --sequences 9 --tau 0.9,0.5 --out {out} --device cpu --heads 0.1,2.0"
    )
    analyze.main(flags.split())
    with open(out / "analysis.json") as f:
        found = json.load(f)
    model = GPT.from_pretrained(checkpoint.find(ckpt))
    idx, targets = draw_windows(data, "val", 9, 16, seed=1337)  # the model's context is shorter than 100
    assert (found["sequences"], found["length"], found["taus"]) == (9, 16, [0.9, 0.5])
    heads = measure_layers(model, idx, (0.9, 0.5))[0]
    assert found["heads"] == {name: values.tolist() for name, values in heads.items() if name != "rest"}
    layers = found["layers"]
    assert layers["max_rank"] == heads["rank_0.9"].amax(-1).tolist()
    assert layers["max_rank"] == pytest.approx(max_rank(model, idx).tolist())
    assert layers["max_rank_0.5"] == heads["rank_0.5"].amax(-1).tolist()
    assert layers["avg_mass"] == heads["mass"].mean(-1).tolist()
    assert (found["loss"], layers["loss_without"]) == skip_losses(model, idx, targets)
    for name in ("rank.png", "maps.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    shown = capsys.readouterr().out
    assert "MaxRank" in shown and found["suggestion"]["reason"] in shown
    before = (out / "analysis.json").read_bytes()
    analyze.main(flags.split())
    assert (out / "analysis.json").read_bytes() == before


def test_opens_a_transformers_folder(tmp_path):
    model = tiny_model(block_size=16, bias=True, vocab_size=257)
    gpt2(model).save_pretrained(tmp_path / "theirs")
    data = write_data(tmp_path / "data", val=600)
    analyze.main(
        f"--ckpt {tmp_path}/theirs --data {data} --sequences 3 --out {tmp_path}/o --device cpu".split()
    )
    with open(tmp_path / "o/analysis.json") as f:
        ranks = json.load(f)["heads"]["rank_0.9"]
    idx, _ = draw_windows(data, "val", 3, 16, 1337)
    assert ranks == measure_layers(model, idx)[0]["rank_0.9"].tolist()


@pytest.mark.parametrize(
    "flags, answer",
    [
        ("--tau 0", "--tau '0': give shares above 0 and at most 1, such as 0.9"),
        ("--tau 0.9,x", "--tau '0.9,x': give shares above 0 and at most 1"),
        ("--eta 1.5", "--eta '1.5': give shares"),
        ("--heads 3.0", "--heads: '3.0' is no head; write LAYER.HEAD, from 0.0 to 2.1"),
        ("--heads 0", "--heads: '0' is no head"),
        ("--length 17", "--length 17 is more than the 16 tokens"),
        ("--length 0", "--length must be at least 1, not 0"),
        ("--sequences 0", "--sequences must be at least 1"),
        ("--sequences 5000", "val has 600 tokens, too few for 5000 windows of 16"),
        ("--split test", "test"),
        ("--data nowhere", "no data folder 'nowhere'"),
        ("--ckpt nowhere/x", "nowhere/x"),
    ],
)
def test_refusals(setting, tmp_path, flags, answer):
    ckpt, data = setting
    out = tmp_path / "out"
    message = refusal(analyze.main, f"--ckpt {ckpt} --data {data} --out {out} --device cpu {flags}".split())
    assert answer in message and "\n" not in message.strip() and not out.exists()


def test_refuses_data_of_another_tokenizer(setting, tmp_path):
    other = {"name": "gpt2", "n_vocab": 50257, "eot": 50256}
    data = write_data(tmp_path / "data", tokenizer=other)
    message = refusal(analyze.main, ["--ckpt", setting[0], "--data", data, "--out", tmp_path / "o"])
    assert "was tokenised with 'gpt2'" in message and not os.path.exists(tmp_path / "o")
