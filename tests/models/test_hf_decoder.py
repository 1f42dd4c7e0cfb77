"""The models of transformers under our interface, against transformers itself."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch.nn import functional as F

from inheritune.models.hf_decoder import Decoder
from inheritune.models.open_model import load_model, open_config, open_weights
from inheritune.weights.gpt2_format import NO_EOT
from model import GPT
from tests.other_models import KINDS, build
from tests.tiny import change_json, write_checkpoint

IDX = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(1))
TARGETS = IDX.roll(-1, 1)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours of the folder that it has saved, the folder)."""
    folder = str(tmp_path_factory.mktemp("decoder") / request.param)
    theirs = build(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder), folder


def test_config_is_the_models(pair):
    theirs, ours, folder = pair
    config = open_config(folder)
    assert config == ours.config
    assert (config.n_layer, config.n_head, config.n_embd) == (4, 4, 32)
    assert (config.block_size, config.vocab_size, config.eot) == (64, 257, 2)
    assert config.num_params == ours.num_params() == theirs.num_parameters()
    blocks = [p for name, p in theirs.named_parameters() if name.startswith(config.block_prefix)]
    assert config.n_layer * config.block_params == sum(p.numel() for p in blocks)


@torch.no_grad()
def test_logits_and_loss(pair):
    theirs, ours, _ = pair
    logits = theirs(IDX).logits
    assert (ours(IDX) - logits).abs().max() < 1e-5
    loss = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    assert ours(IDX, TARGETS).item() == pytest.approx(loss.item())
    soft_cap = getattr(theirs.config, "final_logit_softcapping", None) is not None
    assert ours.plain_head != soft_cap
    if ours.plain_head:
        assert (ours.head(ours.hidden(IDX)) - logits).abs().max() < 1e-5


def test_the_folder_holds_the_parameters(pair):
    _, ours, folder = pair
    stored = load_file(f"{folder}/model.safetensors")
    arranged = ours.config.arrange(dict(ours.named_parameters()))
    assert stored.keys() == arranged.keys() == open_weights(folder, ours.config).keys()
    assert all(torch.equal(stored[name], arranged[name]) for name in stored)


def test_generates_as_transformers_does(pair):
    theirs, ours, _ = pair
    ours.config = dataclasses.replace(ours.config, eot=NO_EOT)
    expected = theirs.generate(IDX[:, :9], max_new_tokens=50, do_sample=False, eos_token_id=None)[:, 9:]
    assert torch.equal(torch.stack(list(ours.generate(IDX[:, :9], 50, temperature=0)), 1), expected)


def test_recomputed_blocks_have_the_same_gradients(pair):
    ours, gradients = pair[1], {}
    for value in ("full", "none"):
        ours.checkpoint_activations = value
        ours.train()
        ours(IDX, TARGETS).backward()
        gradients[value] = [p.grad for p in ours.parameters()]
        ours.zero_grad(set_to_none=True)
    assert all(map(torch.equal, gradients["full"], gradients["none"]))


def test_a_block_that_predicts_a_second_token_is_left_out(tmp_path, capsys):
    build("llama", depth=5).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content |= {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert len(load_model(str(tmp_path)).blocks) == 4
    assert "block 4 predicts a second token and is left out" in capsys.readouterr().err


def test_buffers_that_older_folders_hold_are_left_out(tmp_path):
    build("llama").save_pretrained(tmp_path)
    older = {"model.position_ids": torch.arange(64)[None]}
    older["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | older, file)
    assert len(load_model(str(tmp_path)).blocks) == 4


def test_a_tied_head_may_be_all_that_is_stored(tmp_path):
    """safetensors' save_model leaves out one name of a shared tensor, here that of the embeddings."""
    model = build("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    save_model(model, tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(load_model(str(tmp_path))(IDX), model(IDX).logits)


def test_a_config_that_asks_for_a_package_of_its_authors(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", _attn_implementation="flash_attention_2")
    torch.testing.assert_close(load_model(str(tmp_path))(IDX), model(IDX).logits)


def test_a_gpt2_is_opened_as_one(tmp_path):
    model = write_checkpoint(tmp_path / "gpt2")
    opened = load_model(str(tmp_path / "gpt2"))
    assert type(opened) is GPT and type(opened) is not Decoder
    assert torch.equal(opened(IDX[:, :8]), model(IDX[:, :8]))
