"""The Hugging Face layout: what is read, what is refused, and that transformers opens what is written."""

import dataclasses
import os
import re
import shutil
from unittest.mock import Mock

import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from inheritune.base.errors import UserError
from inheritune.weights import checkpoint, gpt2_format
from model import GPT, GPTConfig
from tests.tiny import change_json, gpt2, same_weights, tiny_config, tiny_model, write_checkpoint, write_model


@pytest.fixture
def saved(tmp_path):
    """(folder, model of transformers) as save_pretrained writes it."""
    model = gpt2(tiny_model(vocab_size=101, n_vocab=101, eot=0))
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


def assert_opens_equal(folder, reference):
    model = GPT.from_pretrained(str(folder)).eval()
    idx = torch.randint(101, (2, 8))
    torch.testing.assert_close(model(idx), reference(idx).logits, rtol=0, atol=1e-5)
    return model


def edit_tensors(folder, change):
    path = os.path.join(folder, "model.safetensors")
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    save_file(change(tensors) or tensors, path, metadata={"format": "pt"})


def as_on_the_hub(tensors):
    """The released files' form: no prefix, the causal-mask buffers among the tensors."""
    tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    for i in range(3):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def with_head(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


def without_wte(tensors):
    return {k: v for k, v in tensors.items() if "wte" not in k}


# the third is what safetensors.torch.save_model may write of a tied model
FORMS = (dict, as_on_the_hub, lambda t: without_wte(with_head(t)), lambda t: as_on_the_hub(with_head(t)))


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_that_the_hub_has(saved, form):
    folder, reference = saved
    edit_tensors(folder, form)
    model = assert_opens_equal(folder, reference)
    assert model.config.vocab_size == 101, "a loaded vocabulary is never padded"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_fp32_models(saved, dtype):
    edit_tensors(saved[0], lambda t: {k: v.to(dtype) for k, v in t.items()})
    model = assert_opens_equal(saved[0], saved[1].to(dtype).float())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_sharded_files(saved, tmp_path):
    _, reference = saved
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = [n for n in os.listdir(tmp_path / "sharded") if n.endswith(".safetensors")]
    assert len(shards) > 1 and not os.path.exists(tmp_path / "sharded/model.safetensors")
    assert_opens_equal(tmp_path / "sharded", reference)

    # transformers takes the whole file if there is one, and leaves an older index beside it
    whole = gpt2(tiny_model(seed=1, vocab_size=101, n_vocab=101, eot=0))
    shutil.copytree(tmp_path / "sharded", tmp_path / "whole")
    whole.save_pretrained(tmp_path / "whole")
    assert os.path.exists(tmp_path / "whole/model.safetensors.index.json")
    assert_opens_equal(tmp_path / "whole", whole)

    os.unlink(tmp_path / "sharded" / shards[0])
    with pytest.raises(UserError, match=re.escape(f"has no {shards[0]}")):
        gpt2_format.read_model(str(tmp_path / "sharded"))


# {change of config.json, or of the tensors: what the error names}
REFUSED = [
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"activation_function": "relu"}, "activation_function='relu'"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
    ({"n_layer": "3"}, "n_layer is '3'"),
    ({"n_embd": None}, "n_embd is None"),
    ({"n_head": 3}, "n_embd 16 is not a multiple of n_head 3"),
    ({"n_vocab": 102}, "n_vocab 102 is not between 1 and vocab_size 101"),
    ({"bias": "no"}, "bias must be true or false"),
    ({"n_layer": 2}, "transformer.h.2.attn.c_attn.bias is not a GPT-2 tensor"),
    ({"n_layer": 4}, "transformer.h.3.ln_1.weight is missing"),
    ({"n_positions": 9}, r"wpe.weight is \(8, 16\), config.json says \(9, 16\)"),
    (lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1}, "lm_head.weight differs"),
    (lambda t: {n: torch.tensor(1.0) for n in ("lm_head.weight", "wte.weight")}, "wpe.weight is missing"),
    (without_wte, "transformer.wte.weight is missing"),
    (lambda t: t | {"transformer.ln_f.bias": torch.zeros(5)}, r"ln_f.bias is \(5,\)"),
    (lambda t: t | {"transformer.wpe.weight": torch.zeros(8, 16).to(torch.float8_e4m3fn)}, "is of type F8"),
    (lambda t: t | {"ln_f.bias": torch.zeros(16)}, "holds transformer.ln_f.bias twice"),
    (lambda t: {"transformer.wte.weight": torch.zeros(1)}, r"is missing; .* \(and \d+ more\)"),
]


@pytest.mark.parametrize("change, named", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(saved, change, named):
    if isinstance(change, dict):
        change_json(saved[0] / "config.json", **change)
    else:
        edit_tensors(saved[0], change)
    with pytest.raises(UserError, match=named):
        GPT.from_pretrained(str(saved[0]))


@pytest.mark.parametrize("said, eot", [(7, 7), ([7, 9], 7), (50256, -1), (None, -1), ([], -1)])
def test_the_id_that_ends_a_text(saved, said, eot):
    """-1 is never drawn; transformers' files say it by null."""
    change_json(saved[0] / "config.json", eos_token_id=said)
    config = gpt2_format.read_config(str(saved[0]))
    assert config["eot"] == eot
    assert gpt2_format.config_json(config)["eos_token_id"] == (None if eot < 0 else eot)


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_opens_what_is_written_with_equal_logits(tmp_path, bias):
    folder = tmp_path / "ours"
    model = write_checkpoint(folder, bias=bias, scale_attn_by_inverse_layer_idx=bias)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (256, 256)
    idx = torch.randint(320, (2, 8))
    torch.testing.assert_close(model(idx), theirs.eval()(idx).logits, rtol=0, atol=1e-5)


OTHERS = {"vocab_size": 67, "n_vocab": 61, "eot": gpt2_format.NO_EOT, "tokenizer": "o200k_base"}
OTHERS |= {"bias": False, "scale_attn_by_inverse_layer_idx": True, "n_layer": 1, "block_size": 5}
OTHERS |= {"n_head": 1, "n_embd": 8}


@pytest.mark.parametrize("changes", [{}, OTHERS])
def test_every_tensor_and_field_survives_a_round_trip_bit_for_bit(tmp_path, changes):
    assert OTHERS.keys() == {f.name for f in dataclasses.fields(GPTConfig)} - {"dropout"}  # a setting of runs
    model = write_checkpoint(tmp_path / "a", **changes)
    again = GPT.from_pretrained(str(tmp_path / "a"))
    assert again.config == model.config and same_weights(model, again)
    os.mkdir(tmp_path / "b")
    write_model(tmp_path / "b", again)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_shapes_are_those_of_the_model_in_its_order():
    """Linear layers turned. It does not take a model, as torch's meta device costs seconds of imports."""
    config = tiny_config(n_layer=11, n_head=3, n_embd=24, block_size=5)
    with torch.device("meta"):
        model = GPT(config)
    turned = {n: p.t() if n.endswith(gpt2_format.INPUT_FIRST) else p for n, p in model.named_parameters()}
    found = list(gpt2_format.shapes(vars(config)).items())
    assert found == [(n, tuple(p.shape)) for n, p in turned.items()]


def test_a_hub_that_cannot_be_reached_is_one_short_line(capfd):
    with pytest.raises(UserError) as e:
        checkpoint.download("nobody/nothing", weights=True)
    assert "nobody/nothing" in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 350
    assert capfd.readouterr() == ("", "")


def test_a_model_with_a_licence_to_accept_says_so(monkeypatch):
    gated = GatedRepoError("403", response=Mock())
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=gated))
    with pytest.raises(UserError, match=r"accept its licence .*, and run hf auth login"):
        checkpoint.download("some/model", weights=True)


@pytest.fixture
def hub(saved, monkeypatch):
    """(snapshot_download's requests so far, the folder that stands for the hub's repository)."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(saved[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked, saved[0]


def test_a_download_fetches_only_what_is_needed(saved, hub):
    assert_opens_equal("some/model", saved[1])
    assert checkpoint.download("some/model", weights=False) == str(saved[0])
    (_, first), (_, weights), (_, few) = hub[0]
    small = {"model.safetensors.index.json", "config.json", "tokenizer.json", "a.model", "a.jinja"}
    for names, patterns in ((small, few), (small | {"model.safetensors"}, first + weights)):
        there = [*small, "model.safetensors", "pytorch_model.bin", "x.py", "tf_model.h5"]
        assert set(filter_repo_objects(there, allow_patterns=patterns)) == names


def test_a_download_fetches_the_shards_that_the_index_names(saved, hub):
    """Some repositories hold the model twice, as `original/…` or `consolidated…`."""
    saved[1].save_pretrained(hub[1], max_shard_size="20KB")
    os.unlink(hub[1] / "model.safetensors")
    checkpoint.download("some/model", weights=True)
    (_, patterns) = hub[0][-1]
    names = [n for n in os.listdir(hub[1]) if n.endswith(".safetensors")]
    twins = ["consolidated.safetensors", "original/model-00001-of-00002.safetensors"]
    assert len(names) > 1 and set(filter_repo_objects(names + twins, allow_patterns=patterns)) == {*names}


@pytest.mark.parametrize("pattern, cure", gpt2_format.OTHER_FORMATS.items())
def test_other_formats_are_named_with_the_cure(tmp_path, pattern, cure):
    write_checkpoint(tmp_path / "a")
    os.rename(tmp_path / "a/model.safetensors", tmp_path / "a" / pattern.replace("*", "1"))
    with pytest.raises(UserError, match=r"a has no model.safetensors, ") as error:
        list(gpt2_format.stored_tensors(str(tmp_path / "a")))
    assert str(error.value).endswith(cure)
    os.unlink(tmp_path / "a/config.json")
    with pytest.raises(UserError, match="neither a checkpoint") as error:
        checkpoint.find(str(tmp_path / "a"))
    assert str(error.value).endswith(cure)


def test_a_large_model_is_written_in_shards(tmp_path, monkeypatch):
    whole = write_checkpoint(tmp_path / "whole")
    monkeypatch.setattr(gpt2_format, "MAX_FILE", 20_000)
    write_checkpoint(tmp_path / "shards")
    sizes = [path.stat().st_size for path in (tmp_path / "shards").glob("model-*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 40_000
    assert same_weights(GPT.from_pretrained(str(tmp_path / "shards")), whole)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.allclose(theirs(torch.arange(8)[None]).logits, whole(torch.arange(8)[None]), atol=1e-5)


def test_a_hub_model_without_the_files_is_refused(hub):
    os.unlink(hub[1] / "model.safetensors")
    with pytest.raises(UserError, match=r"has no model.safetensors, perhaps only a pickle"):
        GPT.from_pretrained("some/model")


def test_what_is_in_the_hubs_cache_needs_no_network(saved, tmp_path, monkeypatch):
    """As hf_hub_download left it: blobs are linked from snapshots/COMMIT, and refs/main names the commit."""
    commit = "0" * 40
    cache = tmp_path / "hub/models--some--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    saved[1].save_pretrained(cache / "snapshots" / commit, max_shard_size="20KB")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert_opens_equal("some/model", saved[1])
