"""Random inputs for each parser of ours: taken or refused in one line."""

import dataclasses
import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from inheritune.base.errors import UserError
from inheritune.data.reader import TrainData, ValData
from inheritune.data.tokenizer import bytes_tokenizer, load_tokenizer
from inheritune.training.command_line import parse, read_config_file
from inheritune.training.settings import TrainSettings
from inheritune.weights import checkpoint, gpt2_format
from inheritune.weights.tensors import read_tensors
from model import GPTConfig

odd = [0, -1, 1, 2**31, 2**63, 2**64, 10**400, float("nan"), float("inf")]
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from(odd))
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
    """Bytes of a valid file with some value replaced, or with a part cut out, overwritten or repeated."""

    @st.composite
    def make(draw):
        if draw(st.booleans()):
            value = json.loads(valid)
            at = value
            while True:
                key = draw(st.sampled_from(list(at) if isinstance(at, dict) else list(range(len(at)))))
                if not isinstance(at[key], (dict, list)) or not at[key] or draw(st.booleans()):
                    at[key] = draw(values)
                    return dumped(value)
                at = at[key]
        start = draw(st.integers(0, len(valid)))
        end = min(len(valid), start + draw(st.integers(0, 40)))
        return valid[:start] + draw(st.binary(max_size=12) | st.just(valid[start:end] * 3)) + valid[end:]

    return make() | st.binary(max_size=80) | values.map(dumped)


WORDS = (
    "n_layer learning_rate out_dir bias None True lambda: import if = # 1 0x e9 1_0 . - + * // % ( ) [ ' ;"
)
pieces = st.sampled_from([*WORDS.split(), '"', "\\", " ", "\n", "\t", "\0", "é", "{", "f'{1}'"])
lines = st.lists(pieces | st.text(max_size=4), max_size=30).map("".join)
configs = lines.map(lambda text: text.encode(errors="replace"))
FLAGS = "--n_layer --dropout --resume --bias --stop-at-val-loss --kd_alpha -- - --x"
flags = st.sampled_from(FLAGS.split())
pairs = st.builds("{}={}".format, flags, st.text(max_size=8) | numbers.map(str))
argv = st.lists(st.one_of(pairs, flags, st.text(max_size=8)), max_size=6)

META = {"tokenizer": {"name": "bytes", "n_vocab": 257, "eot": 256}, "dtype": "uint16"}
META["splits"] = {"train": {"shards": [{"file": "train.bin", "tokens": 1000, "sha256": "0"}]}}
META["splits"]["val"] = {"shards": [{"file": "val.bin", "tokens": 100}]}
STATE = {"step": 4, "best_step": 4, "best_val_loss": 1.5, "bad_steps": 0, "bad_in_a_row": 0, "tokens": 64}
STATE |= {"row": {"loss": "1.5", "lr": "nan"}, "scaler": {}, "settings": {"seed": 1, "n_layer": 2}}
TENSORS = save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})
HEADER_END = 8 + int.from_bytes(TENSORS[:8], "little")
CONFIG = gpt2_format.config_json(dataclasses.asdict(GPTConfig(n_layer=2)))


def open_data(folder):
    TrainData(folder, 8, 1).batch(0, 2)
    ValData(folder, 8, 1000, 4).batch(0)


def parse_line(line):
    try:
        parse((TrainSettings,), line, "")
    except SystemExit as e:  # --help and its abbreviations print, and that is right
        assert e.code == 0


# {what is parsed: (cases, the file as which each is written, what is done with its folder)}
PARSERS = {
    "config file": (configs, "case.py", lambda folder: read_config_file(f"{folder}/case.py")),
    "command line": (argv, None, parse_line),
    "meta.json": (mutated(dumped(META)), "meta.json", open_data),
    "state.json": (mutated(dumped(STATE)), "state.json", checkpoint.read_state),
    "config.json": (mutated(dumped(CONFIG)), "config.json", GPTConfig.from_folder),
    "model.safetensors": (
        mutated(TENSORS[8:HEADER_END]).map(lambda h: len(h).to_bytes(8, "little") + h + TENSORS[HEADER_END:]),
        "model.safetensors",
        lambda folder: [t[:] for t in read_tensors(f"{folder}/model.safetensors").values()],
    ),
    "tokenizer.json": (
        mutated(bytes_tokenizer()),
        "tokenizer.json",
        lambda folder: load_tokenizer(folder).encode("a text"),
    ),
}


@pytest.mark.parametrize("count", [100, pytest.param(17_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PARSERS)
def test_each_case_is_taken_or_refused_in_one_line(tmp_path, name, count, capsys):
    cases, file, take = PARSERS[name]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (tmp_path / "train.bin").write_bytes(bytes(2000))
    (tmp_path / "val.bin").write_bytes(bytes(200))
    refusals = []

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def one(case):
        if file:
            (tmp_path / file).write_bytes(case)
        try:
            take(str(tmp_path) if file else case)
        except (UserError, OSError) as e:  # the latter for a file name too long; errors.one_line answers it
            message = str(e)
            refusals.append(message)
            assert len(message) < 20_000 and ("\n" not in message or " problems:\n" in message)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # a tensor keeps its file open
        one()
    assert refusals
