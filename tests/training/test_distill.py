"""Distillation: the loss against numpy, and what a teacher does to a run."""

import numpy as np
import pytest
import torch

import train
from inheritune.training.losses import Teacher, distillation_loss
from inheritune.training.settings import TrainSettings
from model import GPT
from tests.tiny import SHAPE, arguments, column, contents, rows, same_weights, tiny_model, write_checkpoint

SIZES = dict.fromkeys(SHAPE)  # not on the command line: the model decides


def reference_loss(logits, teacher, targets, n_vocab, alpha, temperature):
    """The formula in numpy, float64."""
    logits, teacher = logits.astype(np.float64), teacher.astype(np.float64)

    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    ce = -np.take_along_axis(log_softmax(logits), targets[..., None], -1).mean()
    q = log_softmax(logits[..., :n_vocab] / temperature)
    p = log_softmax(teacher[..., :n_vocab] / temperature)
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    return alpha * ce + (1 - alpha) * temperature**2 * kl, ce, kl


@pytest.mark.parametrize("alpha, temperature", [(0.0, 4.0), (0.6, 0.5), (1.0, 1.0)])
def test_equals_numpy(alpha, temperature):
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(0, 3, (2, 2, 5, 40)).astype(np.float32)
    targets = rng.integers(0, 33, (2, 5))
    found = distillation_loss(*map(torch.from_numpy, (logits, teacher, targets)), 33, alpha, temperature)
    wanted = reference_loss(logits, teacher, targets, 33, alpha, temperature)
    assert [float(x) for x in found] == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def world(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    write_checkpoint(folder / "teacher", n_layer=3)
    return data, str(folder / "teacher"), folder


def test_alpha_one_is_bit_identical_to_no_teacher(world):
    """Where both take the loss of whole logits, which in fp32 only distillation does."""
    data, teacher, folder = world
    train.main(arguments(data, folder / "plain", dtype="bfloat16"))
    train.main(arguments(data, folder / "one", teacher=teacher, kd_alpha=1.0, dtype="bfloat16"))
    a, b = contents(folder / "plain"), contents(folder / "one")
    for name in a:
        if name.endswith("model.safetensors"):
            assert a[name] == b[name]
    assert column(folder / "plain", "loss") == column(folder / "one", "loss")


def test_both_terms_are_logged_and_make_up_the_loss(world):
    data, teacher, folder = world
    train.main(arguments(data, folder / "kd", teacher=teacher, kd_alpha=0.3, kd_temperature=2.0))
    for row in rows(folder / "kd")[1:]:
        assert row["loss"] == pytest.approx(0.3 * row["ce"] + 0.7 * 4 * row["kl"], rel=1e-5)
    assert column(folder / "kd", "kl")[-1] < column(folder / "kd", "kl")[0]


def test_a_student_equal_to_its_teacher_has_no_divergence_and_the_teacher_is_not_trained(world):
    data, teacher, folder = world
    before = GPT.from_pretrained(teacher).state_dict()
    train.main(arguments(data, folder / "same", teacher=teacher, init_from=teacher, max_iters=2, **SIZES))
    assert rows(folder / "same")[1]["kl"] == pytest.approx(0, abs=1e-6)
    assert same_weights(before, GPT.from_pretrained(teacher).state_dict())


def test_a_teachers_16_bit_matrices_give_the_logits_of_autocast():
    idx = torch.arange(8)[None]
    for bias in (True, False):
        model, cpu = tiny_model(bias=bias), torch.device("cpu")
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            before = model(idx)
            teacher = Teacher(model, TrainSettings(), 257, cpu, torch.bfloat16, compiled=False).model
            assert torch.equal(teacher(idx), before)
        matrices = (teacher.transformer.h[0].mlp.c_fc.weight, teacher.lm_head.weight)
        assert {p.dtype for p in matrices} == {torch.bfloat16}
        assert teacher.transformer.wte.weight.dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_run_distils_alike(world):
    """Teacher and loss are compiled with the student, and both heads are padded."""
    data, _, folder = world
    write_checkpoint(folder / "odd", n_layer=3, vocab_size=257)
    options = {"teacher": folder / "odd", "init_from": folder / "odd", "inherit_layers": 2} | SIZES
    for compiled in (True, False):
        more = {"compile": compiled, "dtype": "bfloat16"}
        train.main(arguments(data, folder / f"compiled-{compiled}", **options | more))
    for name in ("loss", "ce", "kl", "val_loss"):
        a, b = (column(folder / f"compiled-{compiled}", name) for compiled in (True, False))
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 264, "n_vocab": 264}, {"vocab_size": 384}, {"tokenizer": "", "n_vocab": 320}],
)
def test_a_teacher_may_have_more_rows_than_the_tokenizer_has_ids(world, tmp_path, changes):
    """... as a model to start from may, and a student too: KL is over the tokenizer's ids alone."""
    data, plain, _ = world
    write_checkpoint(tmp_path / "padded", **changes)
    train.main(arguments(data, tmp_path / "run", teacher=tmp_path / "padded", max_iters=2))
    more = {"teacher": plain, "init_from": tmp_path / "padded", "max_iters": 2}
    train.main(arguments(data, tmp_path / "student", **more, **SIZES))
    assert len(rows(tmp_path / "student")) == 3
