"""The model card (README.md) of a checkpoint folder: what it was made from, on which data, how good it is.

`hf upload NAME FOLDER` then publishes it. It has the hub's metadata, and our facts under the key
`inheritune`. The card of a model made from this one shows them as the reference's.
"""

import os
import re

from inheritune.base.files import replacing
from inheritune.weights.checkpoint import hub_id, read_lineage

CARD = "README.md"
LICENCE = ("license", "license_name", "license_link", "language")  # taken over from the source's card
# of a training: nats/token on the validation split, tokens, name of the data, settings changed in the run
FACTS = ("val_loss", "tokens", "data", "changes")


def write_card(folder: str, name: str, source: str | None = None, reference: dict | None = None, **facts):
    """Write the card of a checkpoint folder, or renew it.

    name: the title.
    source: the folder that the model was made from; its licence and its facts are taken over.
    facts, reference: {key of FACTS: value} of this model's training and of the reference's.
    """
    from huggingface_hub import ModelCardData

    own, theirs = read_card(folder), read_card(source)
    parent = theirs.get("inheritune", {})
    # of a source that was only cut, not trained, the facts are those of its own reference
    parent = {key: parent[key] for key in FACTS if key in parent} or parent.get("reference", {})
    facts = own.get("inheritune", {}) | facts
    facts["reference"] = parent | facts.get("reference", {}) | (reference or {})
    lineage = read_lineage(folder)
    random = lineage.get("recipe") == "random"  # then nothing was taken of the source's weights
    base = [] if random else [hub_id(source), own.get("base_model"), theirs.get("base_model")]
    data = ModelCardData(
        **{key: own.get(key) or theirs.get(key) for key in LICENCE},
        base_model=next((b for b in base if re.fullmatch(r"[\w.-]+/[\w.-]+", str(b))), None),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["inheritune"],
        inheritune={key: value for key, value in facts.items() if value} or None,
    )
    sources = " and ".join(f"`{source['name']}`" for source in lineage.get("sources", {}).values())
    origin = f"random weights in the architecture of {sources}" if random else sources or "random weights"
    lines = [f"Made by Inheritune (arXiv:2404.08634) from {origin}: see lineage.json."]
    lines += [lineage["warning"]] if "warning" in lineage else []
    for whose, known in (("This model", facts), ("The reference", facts["reference"])):
        found = [f"{key} {known[key]}" for key in FACTS if key in known]
        lines += [f"{whose}: {', '.join(found)}."] if found else []
    untrained = f"These weights have not been trained{'' if random else ' since they were cut'}."
    lines += [] if facts.get("tokens") else [untrained]
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
            data = ModelCard(f.read().expandtabs()).data.to_dict()  # YAML forbids tabs
        if not isinstance(data.get("license", ""), str) or not isinstance(data.get("inheritune", {}), dict):
            raise ValueError
        return data
    except Exception as e:  # it is somebody else's file, and YAML, the hub and the encoding have their errors
        print(f"{path} cannot be read ({type(e).__name__}): correct the licence in the new card, now `other`")
        return {"license": "other"}
