"""Settings: where a value comes from, what is refused, and that a config file is never executed."""

import dataclasses

import pytest

import train
from inheritune.base.errors import UserError
from inheritune.training.command_line import parse
from inheritune.training.settings import HARMLESS, TrainSettings


def read(*argv):
    return parse((TrainSettings,), list(argv), "test")


@pytest.fixture
def config(tmp_path):

    def write(text):
        (tmp_path / "config.py").write_text(text)
        return str(tmp_path / "config.py")

    return write


def refused(*argv):
    with pytest.raises(UserError) as e:
        read(*argv)
    return str(e.value)


def test_the_command_line_beats_the_file_and_the_file_the_default(config):
    settings, given_keys = read(config("n_layer = 3\nn_head = 5\n"), "--n_layer=7")
    assert (settings.n_layer, settings.n_head, settings.n_embd) == (7, 5, TrainSettings().n_embd)
    assert given_keys == {"n_layer", "n_head"}


@pytest.mark.parametrize(
    "argv, key, value",
    [
        (["--n_layer=3"], "n_layer", 3),
        (["--n-layer=3"], "n_layer", 3),
        (["--bias"], "bias", True),
        (["--bias", "false"], "bias", False),
        (["--bias", "--seed=3"], "bias", True),
        (["--out_dir=a=b=c"], "out_dir", "a=b=c"),
        (["--learning_rate=6e-4"], "learning_rate", 6e-4),
        (["--compile=auto"], "compile", None),
        (["--teacher=None"], "teacher", ""),
        (["--inherit_layers=None"], "inherit_layers", None),
    ],
)
def test_every_way_of_writing_a_value(argv, key, value):
    got = getattr(read(*argv)[0], key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("batch_tokens = 12 * 1024 * 40", "batch_tokens", 491_520),
        ("learning_rate = 1  # an int for a float", "learning_rate", 1.0),
        ("max_iters = 7 // 2 + 5 % 3 - -1", "max_iters", 6),
        ("lr_decay_iters = None", "lr_decay_iters", None),
        ("out_dir = 'a' 'b'", "out_dir", "ab"),
        ("\n\n# only a comment\nseed = 1\nseed = 2\n", "seed", 2),
    ],
)
def test_config_files_hold_literals_and_arithmetic(config, text, key, value):
    got = getattr(read(config(text))[0], key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "line",
    [
        "seed = open('{mark}', 'w') and 1",
        "import os; os.mkdir('{mark}')",
        "seed = __import__('os').mkdir('{mark}')",
        "seed, batch_size = 1, 2",
        "out_dir = f'{{1 + 1}}'",
        "seed = batch_size",
        "out_dir = 'a' * 10",
        "seed = 2 ** 10",
        "seed = 1 / 0",
        "seed = ",
    ],
)
def test_a_config_is_never_executed(config, tmp_path, line):
    """Refused with file and line number, and what it would have done has not happened."""
    mark = tmp_path / "mark"
    message = refused(config("n_layer = 2\n" + line.format(mark=mark) + "\n"))
    assert f"{tmp_path}/config.py:2:" in message and "\n" not in message
    assert not mark.exists()


def test_all_problems_of_a_file_and_a_command_line_come_together(config):
    message = refused(config("n_layer = 'two'\nlerning_rate = 1\nbias = 3\n"), "--seed=-1", "--dtype=int8")
    assert message.startswith("5 problems:\n")
    for part in (
        "config.py:1: n_layer must be a whole number, not 'two'",
        "config.py:2: lerning_rate is not a setting (did you mean learning_rate?)",
        "config.py:3: bias must be True or False, not '3'",
        "--seed must be at least 0, not -1",
        "--dtype must be one of auto, float32, bfloat16, float16, not 'int8'",
    ):
        assert part in message


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_layer=2.5"], "must be a whole number"),
        (["--n_layer=" + "9" * 400], "must be a whole number"),
        (["--n_layer"], "expected one argument"),
        (["--learning_rate=1e999"], "must be a number"),
        (["--resume=maybe"], "must be one of never, auto, must"),
        (["a.py", "b.py"], "unknown argument 'b.py'"),
        (["--learn=1"], "unknown argument '--learn=1'"),  # abbreviations are not guessed
    ],
)
def test_wrong_values_are_named(argv, message):
    """More of them are in bad_input.txt."""
    assert message in refused(*argv)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\0", b"((((" * 5000, b"seed = " + b"-" * 20000 + b"1"])
def test_a_file_that_is_no_config_is_one_line(tmp_path, content):
    (tmp_path / "config.py").write_bytes(content)
    message = refused(str(tmp_path / "config.py"))
    assert "config.py" in message and "\n" not in message


def test_every_setting_says_what_it_is(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainSettings):
        assert f"--{field.name}" in text
        assert field.metadata["help"].split()[0] in text
        assert f"\n{field.metadata['heading']}:\n" in text
    assert {f.name for f in dataclasses.fields(TrainSettings)} >= HARMLESS
