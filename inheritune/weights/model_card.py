"""The model card (README.md) of a checkpoint folder: what it was made from, on which data, how good it is.

`hf upload NAME FOLDER` then publishes it. The metadata is the hub's. Its key `inheritune` holds our facts,
which the cards of models made from this one show as those of the reference.
"""

import os
import re

from inheritune.base.files import replacing
from inheritune.weights.checkpoint import hub_id, read_lineage

CARD = "README.md"
LICENCE = ("license", "license_name", "license_link", "language")  # taken over from the source's card
FACTS = {"val_loss": "validation loss {:.4f} nats/token", "tokens": "{:,} training tokens", "data": "data {}"}
FACTS["changes"] = "settings changed in the run ({})"


def write_card(folder: str, name: str, source: str | None = None, reference: dict | None = None, **facts):
    """Write the card of a checkpoint folder, or renew it.

    name: the title.
    source: the folder that the model was made from; its licence and its facts are taken over.
    facts, reference: of the training of this model and of the reference, by the keys of FACTS.
    """
    from huggingface_hub import ModelCardData

    own, theirs = read_card(folder), read_card(source)
    parent = theirs.get("inheritune", {})
    parent = {k: v for k, v in parent.items() if k in FACTS} or parent.get("reference", {})
    facts = own.get("inheritune", {}) | facts
    facts["reference"] = parent | facts.get("reference", {}) | (reference or {})
    base = [hub_id(source), own.get("base_model"), theirs.get("base_model")]
    data = ModelCardData(
        **{key: own.get(key) or theirs.get(key) for key in LICENCE},
        base_model=next((b for b in base if re.fullmatch(r"[\w.-]+/[\w.-]+", str(b))), None),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["inheritune"],
        inheritune={key: value for key, value in facts.items() if value} or None,
    )
    lineage = read_lineage(folder)
    lines = [f"Made from {origin(lineage)} by Inheritune (arXiv:2404.08634)."]
    lines += [lineage["warning"]] if "warning" in lineage else []
    for whose, known in (("This model", facts), ("The reference", facts["reference"])):
        found = [text.format(known[key]) for key, text in FACTS.items() if key in known]
        lines += [f"{whose}: {', '.join(found)}."] if found else []
    lines += [] if facts.get("tokens") else ["It is a start for training: it has not been trained since."]
    with replacing(os.path.join(folder, CARD), "w") as f:
        f.write("\n\n".join([f"---\n{data.to_yaml()}\n---", f"# {name}", *lines]) + "\n")


def read_card(folder: str | None) -> dict:
    """The metadata of a folder's card, {} without a card. Where it cannot be read, a line says so, and the
    licence is `other`."""
    from huggingface_hub import ModelCard

    path = os.path.join(folder or "", CARD)
    if not folder or not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8-sig") as f:
            data = ModelCard(f.read().expandtabs()).data.to_dict()
        if not isinstance(data.get("license", ""), str) or not isinstance(data.get("inheritune", {}), dict):
            raise ValueError
        return data
    except Exception as e:  # it is somebody else's file, and YAML, the hub and the encoding have their errors
        print(f"{path} cannot be read ({type(e).__name__}): correct the licence in the new card, now `other`")
        return {"license": "other"}


def origin(lineage: dict) -> str:
    """The sources that lineage.json names: "blocks 0, 1 of `gpt2`". It also says what they were made from."""
    blocks = [(block["from"], str(block["block"])) for block in lineage.get("blocks", [])]
    taken = {key: [number for whose, number in blocks if whose == key] for key in lineage.get("sources", {})}
    names = {key: f"`{source['name']}`" for key, source in lineage.get("sources", {}).items()}
    found = [f"blocks {', '.join(taken[key]) or '(none)'} of {name}" for key, name in names.items()]
    return " and ".join(found) or "random weights"
