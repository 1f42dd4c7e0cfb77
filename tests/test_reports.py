"""What people ran into: each test is named by what somebody did."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import analyze
import inherit
import prepare
import sample
import score
import train
from inheritune.base.errors import UserError
from inheritune.data.reader import Tokens
from inheritune.data.tokenizer import load_tokenizer
from inheritune.training.command_line import NANOGPT, parse
from inheritune.training.settings import ReplicateSettings, TrainSettings
from inheritune.weights import checkpoint
from model import GPT, GPTConfig
from tests import tiny
from tests.assets import english
from tests.data.test_tokenizer import save
from tests.tiny import ROOT, arguments, change_json, refusal, tiny_model, write_checkpoint, write_data

SHAPELESS = dict.fromkeys(tiny.SHAPE)  # the model to start from has them


# Settings


@pytest.mark.parametrize("name", NANOGPT)
def test_a_person_brings_nanogpts_config(tmp_path, name):
    """The line says what to write instead, and in a file where."""
    (tmp_path / "theirs.py").write_text(f"n_layer = 2\n{name} = 5\n")
    said = refusal(train.main, [str(tmp_path / "theirs.py")])
    assert f"theirs.py:2: {name} is not a setting but nanoGPT's: {NANOGPT[name]}" in said
    assert f"is nanoGPT's: {NANOGPT[name]}" in refusal(train.main, [f"--{name.replace('_', '-')}"])


def test_a_person_writes_a_path_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.py").write_text('dataset = "~/data"\nteacher = "~/teacher"\n')
    argv = [str(tmp_path / "config.py"), "--out_dir=~/run", "--results=~/r", "--reference_config=~/ref.py"]
    settings, rep, _ = parse((TrainSettings, ReplicateSettings), argv, "")
    found = [settings.dataset, settings.teacher, settings.out_dir, rep.results, rep.reference_config]
    assert found == [f"{tmp_path}/{name}" for name in ("data", "teacher", "run", "r", "ref.py")]
    # commands with flags of their own: --out ~/x the shell expands, --out=~/x nobody else does
    args = inherit.make_parser().parse_args(["--ckpt=~/ref", "--layers=2", "--out=~/small"])
    assert (args.ckpt, args.out) == (f"{tmp_path}/ref", f"{tmp_path}/small")


# Checkpoints


def test_a_person_fine_tunes_a_bias_free_model_in_transformers(tmp_path):
    """There it has biases, which are trained. With our key set, they come back, and go on from there."""
    write_checkpoint(tmp_path / "ours", bias=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    idx = torch.randint(257, (2, 8))
    theirs(idx, labels=idx).loss.backward()
    torch.optim.AdamW(theirs.parameters(), lr=0.01).step()
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="says bias: false; write bias: true"):
        GPT.from_pretrained(str(tmp_path / "theirs"))
    change_json(tmp_path / "theirs/config.json", bias=True)
    back = GPT.from_pretrained(str(tmp_path / "theirs")).eval()
    assert back.config.bias
    torch.testing.assert_close(back(idx), theirs(idx).logits, rtol=0, atol=1e-5)
    data = write_data(tmp_path / "data")
    train.main(arguments(data, tmp_path / "run", init_from=tmp_path / "theirs", max_iters=1, **SHAPELESS))


def test_a_person_uses_a_model_whose_vocabulary_others_padded_or_enlarged(tmp_path):
    """As nanoGPT pads to 50,304 and resize_token_embeddings adds rows: all scripts go by train.py's rule."""
    folder, out = str(tmp_path / "theirs"), str(tmp_path / "run")
    data = write_data(tmp_path / "data", val=600)
    tiny.gpt2(tiny_model(n_layer=4, block_size=16, vocab_size=264)).save_pretrained(folder)
    assert GPTConfig.from_folder(folder).tokenizer == ""
    train.main(arguments(data, out, init_from=folder, max_iters=1, eval_tokens=600, **SHAPELESS))
    common = ["--ckpt", folder, "--data", data, "--device", "cpu", "--out"]
    score.main([*common, str(tmp_path / "score.json")])
    loss = json.loads((tmp_path / "score.json").read_text())["loss"]["loss"]
    on_whole_windows = tiny.column(out, "val_loss")[0]
    assert loss == pytest.approx(on_whole_windows, rel=0.05)
    analyze.main([*common, str(tmp_path / "analysis"), "--sequences", "5"])
    inherit.main(["--ckpt", folder, "--layers", "auto", "--data", data, "--out", str(tmp_path / "small")])


def test_a_person_inherits_from_a_model_with_files_of_all_kinds(tmp_path):
    """All but weights come along, and the special ids stay as they were."""
    source, small = tmp_path / "source", tmp_path / "small"
    write_checkpoint(source, n_layer=3)
    ids = {"bos_token_id": 5, "eos_token_id": 7}
    change_json(source / "config.json", **ids)
    kept = ["vocab.txt", "spiece.model", "chat_template.jinja", "generation_config.json", "tokenizer.json"]
    left = ["pytorch_model.bin", "optimizer.pt", "model.safetensors.index.json.bak.h5", "SHA256SUMS"]
    for name in [*kept, *left, ".gitattributes", "README.md"]:
        (source / name).write_text(name)
    (source / "onnx").mkdir()
    inherit.main(["--ckpt", str(source), "--layers=2", "--out", str(small)])
    ours = ["config.json", "model.safetensors", "lineage.json", "tokenizer_config.json"]
    assert sorted(os.listdir(small)) == sorted([*kept, *ours, "README.md"])
    assert all((small / name).read_text() == name for name in kept)
    assert (small / "README.md").read_text() != "README.md", "a card of its own"
    made = json.loads((small / "config.json").read_text())
    assert ids.items() <= made.items() and made["n_layer"] == 2


# W&B and TensorBoard


class Wandb:
    """What train.py uses of the package, noting what it is called with."""

    class Error(Exception):
        pass

    def __init__(self, error=None):
        self.error, self.runs = error, []

    def init(self, **options):
        if self.error:
            raise self.Error(self.error)
        self.runs.append(options)
        return self

    def log(self, values, step):
        pass


def test_a_person_sends_the_log_to_wandb_without_a_key(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb("No API key configured.\nSee our documentation\n"))
    said = refusal(train.main, arguments(write_data(tmp_path / "data"), tmp_path / "out", log_to="wandb"))
    assert "W&B says: No API key configured.; run `wandb login`, set WANDB_MODE=offline" in said


def test_a_person_resumes_a_run_that_wandb_shows(tmp_path, monkeypatch):
    """It goes on as one run there."""
    monkeypatch.setitem(sys.modules, "wandb", module := Wandb())
    data = write_data(tmp_path / "data")
    for out, steps in (("a", 4), ("a", 8), ("b", 4)):
        options = {"log_to": "wandb", "resume": "auto", "max_iters": steps, "lr_decay_iters": 8}
        train.main(arguments(data, tmp_path / out, **options))
    first, second, other = [run["id"] for run in module.runs]
    assert first == second != other and {run["resume"] for run in module.runs} == {"allow"}


@pytest.mark.slow
def test_a_persons_resumed_run_has_each_step_once_in_tensorboard(tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data, out, step = write_data(tmp_path / "data"), tmp_path / "out", train.train_step

    def killed(run):
        if run.state.step == 7:
            raise RuntimeError
        step(run)

    monkeypatch.setattr(train, "train_step", killed)
    with pytest.raises(RuntimeError):
        train.main(arguments(data, out, log_to="tensorboard"))
    monkeypatch.setattr(train, "train_step", step)
    train.main(arguments(data, out, log_to="tensorboard", resume="must"))
    events = reader.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 13))
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(tiny.column(out, "loss"), rel=1e-6)


# Machines

SCRIPTS = ["analyze", "grow", "inherit", "prepare", "prepare_fineweb", "prepare_owt"]
SCRIPTS += ["replicate", "sample", "score", "train"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_person_makes_a_mistake_in_a_shell_inside_a_job(script, monkeypatch):
    """RANK=1 of WORLD_SIZE=2 there means nothing to a script that one process runs."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    main = importlib.import_module(script).main
    if script in ("train", "score"):  # these are what torchrun starts: rank 0 says it
        with pytest.raises(SystemExit) as end:
            main(["--no_such_flag"])
        assert end.value.code == 1
    else:
        assert "--help lists all" in refusal(main, ["--no_such_flag"])


def test_a_person_has_half_of_torchruns_environment(tmp_path, monkeypatch):
    data = write_data(tmp_path / "data")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    said = refusal(train.main, arguments(data, tmp_path / "out"))
    assert "WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT not set" in said


def test_a_person_starts_on_windows():
    """There are neither fcntl nor resource."""
    code = f"""
import sys
sys.modules.update(fcntl=None, resource=None)
for name in {SCRIPTS}:
    try:
        __import__(name)
    except SystemExit as e:
        print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["nanoInheritune runs on Linux and macOS; on Windows use WSL"] * 10


# Sampling


def test_a_person_spells_out_end_of_text_in_a_prompt():
    tokenizer = load_tokenizer("bytes")
    prompt = "a<|endoftext|>b<|endoftext|>"
    assert sample.encode_prompt(prompt, tokenizer) == [97, 256, 98, 256]
    assert sample.encode_prompt("<|endoftext|", tokenizer) == [*b"<|endoftext|"]


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}])
def test_a_person_samples_from_a_run_that_has_diverged(options):
    """(Its checkpoint is refused; but weights that are loaded may overflow in half precision.)"""
    model = tiny_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 5] = float("nan")
    steps = model.generate(torch.zeros(1, 3, dtype=torch.int64), 4, **options)
    with pytest.raises(UserError, match="weights, or its activations in this dtype, are not finite"):
        next(steps)


def test_a_person_asks_for_a_tiny_temperature(tmp_path, capsys):
    write_checkpoint(tmp_path / "ckpt")
    said = []
    for temperature in ("0", "1e-40", "1e-7"):
        flags = ["--prompt", "ab", "--temperature", temperature, "--max_new_tokens", "9"]
        sample.main(["--ckpt", str(tmp_path / "ckpt"), *flags])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]


# Text


def test_a_person_trains_on_nanogpts_characters(tmp_path, capsys):
    data = write_data(tmp_path / "shakespeare_char", meta=False)
    Tokens(data, "val")
    Tokens(data, "val")
    said = capsys.readouterr().err
    assert said.count("the highest in val is 59: was another vocabulary used?") == 1
    write_data(tmp_path / "gpt2", meta=False, high=50257)
    np.arange(40_000, 50_257, dtype="<u2").tofile(tmp_path / "gpt2/val.bin")
    Tokens(str(tmp_path / "gpt2"), "val")
    assert capsys.readouterr().err == ""


def test_a_persons_config_begins_with_a_byte_order_mark(tmp_path):
    write_checkpoint(tmp_path / "ckpt")
    config = tmp_path / "ckpt/config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    GPTConfig.from_folder(str(tmp_path / "ckpt"))


def test_a_person_goes_on_with_a_model_of_another_vocabulary(tmp_path, capsys):
    """A model with a tokenizer of its own: prepared for, cut down, trained, scored and sampled."""
    source, data, out = tmp_path / "source", str(tmp_path / "data"), tmp_path / "run"
    tokenizer = load_tokenizer(save(source, "word_piece"))
    tiny.gpt2(tiny_model(vocab_size=1000)).save_pretrained(source)
    text = "".join(english())[:60_000]
    (tmp_path / "a.txt").write_text(text)
    prepare.main([str(tmp_path / "a.txt"), "--tokenizer", str(source), "--out", data])
    entry = json.loads((tmp_path / "data/meta.json").read_text())["tokenizer"]
    assert entry == tokenizer.describe() == load_tokenizer(entry["name"], data).describe()

    inherit.main(["--ckpt", str(source), "--layers=2", "--out", str(tmp_path / "small")])
    train.main(arguments(data, out, init_from=tmp_path / "small", max_iters=1, **SHAPELESS))
    assert GPTConfig.from_folder(checkpoint.find(str(out))).tokenizer == "tokenizer.json"
    score.main(["--ckpt", str(out), "--data", data, "--device=cpu"])
    capsys.readouterr()
    sample.main(["--ckpt", str(out), "--prompt", "The", "--max_new_tokens=20", "--device=cpu"])
    assert capsys.readouterr().out.startswith("The")
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint.find(str(out)))
    expected = theirs(text[:500], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.encode(text[:500]) == expected
