"""Model cards. pytest tests/weights/test_model_card.py"""

import os

import pytest
from huggingface_hub import ModelCard

import inherit
import train
from inheritune.weights import checkpoint
from inheritune.weights.model_card import read_card, write_card
from tests.other_models import build
from tests.tiny import arguments, rows, write_checkpoint


def card(folder):
    return ModelCard.load(os.path.join(folder, "README.md"))


def hub_folder(tmp_path):
    """A checkpoint as the hub's client keeps it, with the card of its authors."""
    folder = tmp_path / "models--some-org--gpt2-tiny" / "snapshots" / "abc"
    write_checkpoint(folder)
    text = "---\nlicense: other\nlicense_name: ours\nlicense_link: LICENSE\nlanguage: en\n"
    (folder / "README.md").write_text(text + "tags:\n- old\n---\n# Theirs\n")
    (folder / "LICENSE").write_text("ours")
    return folder


def test_inherit_says_base_model_blocks_and_licence(tmp_path):
    source = hub_folder(tmp_path)
    inherit.main(["--ckpt", str(source), "--blocks", "0-1,2", "--out", str(tmp_path / "small")])
    made = card(tmp_path / "small")
    assert made.data.to_dict() == {
        "base_model": "some-org/gpt2-tiny",
        "language": "en",
        "library_name": "transformers",
        "license": "other",
        "license_link": "LICENSE",
        "license_name": "ours",
        "pipeline_tag": "text-generation",
        "tags": ["inheritune"],
    }
    assert "# small" in made.text and "blocks 0, 1, 2 of `some-org/gpt2-tiny`" in made.text
    assert "it has not been trained since" in made.text and "Theirs" not in made.text
    assert (tmp_path / "small/LICENSE").read_text() == "ours"


def test_training_says_data_tokens_and_losses_with_the_reference_beside(data, plain, tmp_path):
    """A reference, half of it, and that trained: each card builds on the one before."""
    reference = card(os.path.join(plain, "best"))
    best = checkpoint.find(plain, "best")
    step = int(best[-8:])
    loss = next(r["val_loss"] for r in rows(plain) if r["step"] == step)
    facts = reference.data.to_dict()["inheritune"]
    assert facts == {"val_loss": pytest.approx(loss), "tokens": step * 64, "data": os.path.basename(data)}
    assert "Made from random weights" in reference.text and f"{loss:.4f}" in reference.text
    assert "base_model" not in reference.data.to_dict() and "license" not in reference.data.to_dict()

    inherit.main(["--ckpt", plain, "--layers", "1", "--out", str(tmp_path / "half")])
    assert card(tmp_path / "half").data.to_dict()["inheritune"] == {"reference": facts}
    train.main(
        arguments(
            data,
            str(tmp_path / "out"),
            init_from=tmp_path / "half",
            **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size")),
        )
    )
    for link in ("best", "latest"):
        made = card(tmp_path / "out" / link)
        ours = made.data.to_dict()["inheritune"]
        assert ours["reference"] == facts
        assert f"This model: validation loss {ours['val_loss']:.4f} nats/token" in made.text
        assert f"The reference: validation loss {loss:.4f} nats/token" in made.text
        assert "blocks 0 of" in made.text
    assert ours["tokens"] == 12 * 64

    write_card(str(tmp_path / "out/latest"), "named", reference={"val_loss": 1.5})
    renewed = card(tmp_path / "out/latest")
    assert renewed.data.to_dict()["inheritune"] == ours | {"reference": facts | {"val_loss": 1.5}}
    assert "The reference: validation loss 1.5000" in renewed.text and "# named" in renewed.text


def test_other_models_keep_their_licence(tmp_path):
    build("llama").save_pretrained(tmp_path / "llama")
    (tmp_path / "llama/README.md").write_text("---\nlicense: apache-2.0\nbase_model: a/b\n---\nx")
    inherit.main(["--ckpt", str(tmp_path / "llama"), "--layers", "2", "--out", str(tmp_path / "out")])
    made = card(tmp_path / "out").data
    assert (made.license, made.base_model) == ("apache-2.0", "a/b")


@pytest.mark.parametrize(
    "text, license",
    [
        ("", None),
        ("# a title alone", None),
        ("\ufeff---\nlicense: mit\n---\n", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense:\tmit\n---\n", "mit"),
        ("---\n\tlicense: mit\n---\n", "mit"),
        ("---\nlicense: [\n---\n", "other"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "other"),
        ("---\n- a\n---\n", "other"),
        ("---\ninheritune: 3\n---\n", "other"),
    ],
)
def test_a_licence_is_read_or_said_to_be_other(text, license, tmp_path, capsys):
    write_checkpoint(tmp_path / "ckpt")
    (tmp_path / "ckpt/README.md").write_bytes(text.encode())
    inherit.main(["--ckpt", str(tmp_path / "ckpt"), "--layers", "2", "--out", str(tmp_path / "out")])
    assert card(tmp_path / "out").data.license == license
    said = f"{tmp_path}/ckpt/README.md cannot be read" in capsys.readouterr().out
    assert said == (license == "other")


@pytest.mark.parametrize("base", ["../models/gpt2", "/home/me/gpt2", "gpt2", ["a/b", "c/d"], "a/b/c"])
def test_a_base_model_is_an_owner_and_a_name(base, tmp_path):
    write_checkpoint(tmp_path / "ckpt")
    (tmp_path / "ckpt/README.md").write_text(f"---\nbase_model: {base}\n---\n")
    write_card(str(tmp_path / "ckpt"), "x")
    assert "base_model" not in read_card(str(tmp_path / "ckpt"))
