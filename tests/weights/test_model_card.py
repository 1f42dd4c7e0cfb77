"""Model cards."""

import os

import pytest
from huggingface_hub import ModelCard

import inherit
import train
from inheritune.weights import checkpoint
from inheritune.weights.model_card import read_card, write_card
from tests.tiny import arguments, rows, write_checkpoint


def card(folder):
    return ModelCard.load(os.path.join(folder, "README.md"))


def test_inherit_says_base_model_and_licence(tmp_path):
    """Of a checkpoint as the hub's client keeps it, with the card of its authors."""
    source = tmp_path / "models--some-org--gpt2-tiny" / "snapshots" / "abc"
    write_checkpoint(source)
    text = "---\nlicense: other\nlicense_name: ours\nlicense_link: LICENSE\nlanguage: en\n"
    (source / "README.md").write_text(text + "tags:\n- old\n---\n# Theirs\n")
    (source / "LICENSE").write_text("ours")
    inherit.main(["--ckpt", str(source), "--blocks", "0-1,2", "--out", str(tmp_path / "small")])
    made = card(tmp_path / "small")
    theirs = {"license": "other", "license_link": "LICENSE", "license_name": "ours", "language": "en"}
    ours = {"base_model": "some-org/gpt2-tiny", "library_name": "transformers", "tags": ["inheritune"]}
    assert made.data.to_dict() == theirs | ours | {"pipeline_tag": "text-generation"}
    assert "# small" in made.text and "from `some-org/gpt2-tiny`" in made.text
    assert "have not been trained since" in made.text and "Theirs" not in made.text
    assert (tmp_path / "small/LICENSE").read_text() == "ours"

    flags = ["--layers", "1", "--recipe", "random", "--out", str(tmp_path / "new")]
    inherit.main(["--ckpt", str(source), *flags])
    made = card(tmp_path / "new")
    assert "base_model" not in made.data.to_dict() and "since they were cut" not in made.text
    assert "from random weights in the architecture of `some-org/gpt2-tiny`" in made.text
    assert checkpoint.read_lineage(str(tmp_path / "new"))["embeddings_and_ln_f"] == "random"


def test_training_says_data_tokens_and_losses_with_the_reference_beside(data, plain, tmp_path):
    """A reference, half of it, and that trained: each card builds on the one before."""
    reference, step = card(os.path.join(plain, "best")), int(checkpoint.find(plain, "best")[-8:])
    loss = next(r["val_loss"] for r in rows(plain) if r["step"] == step)
    facts = reference.data.to_dict()["inheritune"]
    assert facts == {"val_loss": pytest.approx(loss), "tokens": step * 64, "data": os.path.basename(data)}
    assert "from random weights" in reference.text and f"val_loss {facts['val_loss']}" in reference.text
    assert "base_model" not in reference.data.to_dict() and "license" not in reference.data.to_dict()

    inherit.main(["--ckpt", plain, "--layers", "1", "--out", str(tmp_path / "half")])
    assert card(tmp_path / "half").data.to_dict()["inheritune"] == {"reference": facts}
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"))
    train.main(arguments(data, str(tmp_path / "out"), init_from=tmp_path / "half", max_iters=4, **shape))
    made = card(tmp_path / "out/latest")
    ours = made.data.to_dict()["inheritune"]
    assert ours["reference"] == facts and ours["tokens"] == 4 * 64
    assert f"This model: val_loss {ours['val_loss']}, tokens 256" in made.text
    assert f"The reference: val_loss {facts['val_loss']}" in made.text

    write_card(str(tmp_path / "out/latest"), "named", reference={"val_loss": 1.5})
    renewed = card(tmp_path / "out/latest")
    assert renewed.data.to_dict()["inheritune"] == ours | {"reference": facts | {"val_loss": 1.5}}
    assert "The reference: val_loss 1.5" in renewed.text and "# named" in renewed.text


@pytest.mark.parametrize(
    "text, license",
    [
        ("# a title alone", None),
        ("\ufeff---\nlicense: mit\n---\n", "mit"),
        ("---\n\tlicense:\tmit\n---\n", "mit"),
        ("---\nlicense: [\n---\n", "other"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "other"),
        ("---\ninheritune: 3\n---\n", "other"),
    ],
)
def test_a_licence_is_read_or_said_to_be_other(text, license, tmp_path, capsys):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_card(str(tmp_path)).get("license") == license
    assert ("cannot be read" in capsys.readouterr().out) == (license == "other")


@pytest.mark.parametrize("base", ["../models/gpt2", "/home/me/gpt2", "gpt2", ["a/b", "c/d"], "a/b/c", "a/b"])
def test_a_base_model_is_an_owner_and_a_name(base, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nbase_model: {base}\n---\n")
    write_card(str(tmp_path), "x")
    assert read_card(str(tmp_path)).get("base_model") == (base if base == "a/b" else None)
