"""100,000 random inputs for the parsers that are ours: config files, command lines, meta.json, state.json,
the config.json of a checkpoint, tokenizer.json. Each is taken or refused in one line, without memory that
stays.

pytest tests/stress -m slow        (a tenth of it, always: python -m pytest tests/stress/test_fuzz.py)
"""

import dataclasses
import json
import resource
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inheritune.base.errors import UserError
from inheritune.data import reader as data
from inheritune.data.tokenizer import bytes_tokenizer, load_tokenizer
from inheritune.training.command_line import parse, read_config_file
from inheritune.training.settings import TrainSettings
from inheritune.weights import checkpoint, gpt2_format
from model import GPTConfig

SLOW = 17_000  # cases for each of six parsers
FEW = 400

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**400, float("nan"), float("inf")]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=12))
values = st.recursive(
    scalars,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3),
    max_leaves=6,
)


def dumped(value):
    """JSON text of a value, as a hostile writer would have it: NaN and all."""
    return json.dumps(value).encode()


def mutated(valid):
    """Bytes of a valid file with some values replaced, or with a part cut out, overwritten or repeated."""

    @st.composite
    def make(draw):
        if draw(st.booleans()):
            value = json.loads(valid)
            at = value
            for _ in range(draw(st.integers(0, 4))):
                keys = list(at) if isinstance(at, dict) else list(range(len(at)))
                key = draw(st.sampled_from(keys)) if keys else None
                if key is None or not isinstance(at[key], (dict, list)) or not at[key]:
                    break
                at = at[key]
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            at[draw(st.sampled_from(keys))] = draw(values)
            return dumped(value)
        start = draw(st.integers(0, len(valid)))
        end = min(len(valid), start + draw(st.integers(0, 40)))
        return valid[:start] + draw(st.binary(max_size=12) | st.just(valid[start:end] * 3)) + valid[end:]

    return make() | st.binary(max_size=80) | values.map(dumped)


def fuzz(strategy, take):
    """Hand `take` as many cases as asked for: each is taken, or refused in one line."""

    def run(count):
        refusals, seen = 0, 0

        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def one(case):
            nonlocal refusals, seen
            seen += 1
            try:
                take(case)
            except (
                UserError,
                OSError,
            ) as e:  # the latter for a file name too long; errors.one_line answers it
                refusals += 1
                message = str(e)
                assert len(message) < 20_000 and ("\n" not in message or " problems:\n" in message)

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
        assert grown < 500, f"{grown} MB"
        assert seen >= count * 0.9 and refusals > 0
        return seen

    return run


def written(path, take):
    """`take` of the path at which the case stands as a file."""

    def work(case):
        path.write_bytes(case)
        take(path)

    return work


WORDS = (
    "n_layer learning_rate out_dir bias None True lambda: import if = # 1 0x e9 1_0 . - + * // % ( ) [ ' ; {"
)
pieces = st.sampled_from([*WORDS.split(), '"', "\\", " ", "\n", "\t", "\0", "é", "f'{1}'"])
configs = st.lists(pieces | st.text(max_size=4), max_size=30).map(
    lambda p: "".join(p).encode("utf-8", "replace")
)
flags = st.sampled_from(
    ["--n_layer", "--dropout", "--resume", "--bias", "--stop-at-val-loss", "--kd_alpha", "--", "-", "--x"]
)
argv = st.lists(
    st.one_of(
        st.builds("{}={}".format, flags, st.text(max_size=8) | numbers.map(str)), flags, st.text(max_size=8)
    ),
    max_size=6,
)


@pytest.fixture
def parsers(tmp_path):
    """{name: function that tries so many cases}."""
    (tmp_path / "d").mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "t").mkdir()
    (tmp_path / "t/tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (tmp_path / "d/train.bin").write_bytes(bytes(2000))
    (tmp_path / "d/val.bin").write_bytes(bytes(200))
    shards = {"train": {"shards": [{"file": "train.bin", "tokens": 1000, "sha256": "0"}]}}
    shards["val"] = {"shards": [{"file": "val.bin", "tokens": 100}]}
    meta = dumped(
        {"tokenizer": {"name": "bytes", "n_vocab": 257, "eot": 256}, "dtype": "uint16", "splits": shards}
    )
    state = {"step": 4, "best_step": 4, "best_val_loss": 1.5, "bad_steps": 0, "bad_in_a_row": 0}
    state |= {
        "row": {"loss": "1.5", "lr": "nan"},
        "scaler": {},
        "settings": {"seed": 1, "n_layer": 2},
        "tokens": 64,
    }
    config = dumped(gpt2_format.config_json(dataclasses.asdict(GPTConfig(n_layer=2))))

    def open_data(path):
        data.TrainData(str(path.parent), 8, 1).batch(0, 2)
        data.ValData(str(path.parent), 8, 1000, 4).batch(0)

    def open_state(path):
        checkpoint.read_state(str(path.parent))

    def open_line(line):
        parse((TrainSettings,), line, "")

    def open_tokenizer(path):
        load_tokenizer(path).encode("a text")

    def no_exit(take):
        def work(case):
            try:
                take(case)
            except SystemExit as e:  # --help and its abbreviations print, and that is right
                assert e.code == 0

        return work

    file = tmp_path / "case.py"
    return {
        "config file": fuzz(configs, written(file, lambda p: read_config_file(str(p)))),
        "command line": fuzz(argv, no_exit(open_line)),
        "meta.json": fuzz(mutated(meta), written(tmp_path / "d/meta.json", open_data)),
        "state.json": fuzz(mutated(dumped(state)), written(tmp_path / "c/state.json", open_state)),
        "config.json": fuzz(
            mutated(config),
            written(tmp_path / "c/config.json", lambda p: GPTConfig.from_folder(str(p.parent))),
        ),
        "tokenizer.json": fuzz(
            mutated(bytes_tokenizer()),
            written(tmp_path / "t/tokenizer.json", lambda p: open_tokenizer(str(p))),
        ),
    }


NAMES = ("config file", "command line", "meta.json", "state.json", "config.json", "tokenizer.json")


@pytest.mark.parametrize("name", NAMES)
def test_few(parsers, name, capsys):
    parsers[name](FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_thousand(parsers, name, capsys):
    assert parsers[name](SLOW) >= SLOW * 0.9
