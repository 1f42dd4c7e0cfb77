"""The model card (README.md) of a checkpoint folder: what it was made from, on which data, how good it is; so
that `hf upload NAME FOLDER` is all that is left to publish.

Its metadata is the hub's; under `inheritune` it has our own facts, which the cards of later models build on.
"""

import os

from inheritune.base.files import replacing
from inheritune.weights.checkpoint import hub_id, read_lineage

CARD = "README.md"
INHERITED = ("license", "license_name", "license_link", "language")  # from the card of the source
FACTS = {"val_loss": "validation loss (nats/token)", "tokens": "training tokens", "data": "data"}


def write_card(folder: str, name: str, source: str | None = None, **facts) -> None:
    """Write the card of a checkpoint folder, or renew it.

    source: folder of the model that it was made from, whose licence and facts it takes over. facts: val_loss,
    tokens and data of its training; reference: the same facts of the reference, a dict.
    """
    from huggingface_hub import ModelCard, ModelCardData

    # what is known
    own, theirs = read_card(folder), read_card(source)
    known, before = facts_in(own, "inheritune") | facts, facts_in(theirs, "inheritune")
    reference = before or facts_in(theirs.get("inheritune"), "reference")
    known["reference"] = reference | facts_in(own.get("inheritune"), "reference") | facts.get("reference", {})

    # metadata
    metadata = {key: own.get(key) or theirs.get(key) for key in INHERITED}
    metadata["base_model"] = hub_id(source) or own.get("base_model") or theirs.get("base_model")
    metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["inheritune"]}
    metadata["inheritune"] = {key: value for key, value in known.items() if value}
    yaml = ModelCardData(**{key: value for key, value in metadata.items() if value}).to_yaml()

    # text
    trained = "" if known.get("tokens") else " Not trained since: a start for training."
    lines = [
        f"# {name}",
        f"Made from {origin(read_lineage(folder))} by Inheritune (arXiv:2404.08634).{trained}",
    ]
    rows = [
        f"| {title} | {shown(known.get(fact))} | {shown(known['reference'].get(fact))} |"
        for fact, title in FACTS.items()
        if fact in known or fact in known["reference"]
    ]
    if rows:
        lines.append("\n".join(["| | this model | reference |", "| --- | ---: | ---: |", *rows]))
    card = ModelCard(f"---\n{yaml}\n---\n\n" + "\n\n".join(lines) + "\n")
    with replacing(os.path.join(folder, CARD), "w") as f:
        f.write(str(card))


def read_card(folder: str | None) -> dict:
    """The metadata of a folder's card; {} where there is none that can be read."""
    from huggingface_hub import ModelCard

    path = os.path.join(folder or "", CARD)
    if not folder or not os.path.isfile(path):
        return {}
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's file: treat all of it as: says nothing
        return {}


def facts_in(data, key: str) -> dict:
    """The FACTS under a key of a card's metadata, which may hold anything."""
    found = data.get(key) if isinstance(data, dict) else None
    found = found if isinstance(found, dict) else {}
    return {fact: found[fact] for fact in FACTS if isinstance(found.get(fact), (int, float, str))}


def origin(lineage: dict) -> str:
    """What lineage.json says, in words."""
    if not lineage:
        return "random weights"
    parts = []
    for name, source in lineage["sources"].items():
        blocks = [block["block"] for block in lineage["blocks"] if block["from"] == name]
        which = f"blocks {ranges(blocks)}" if blocks else "the sizes"
        nested = f" (which was made from {origin(source['lineage'])})" if source["lineage"] else ""
        parts.append(f"{which} of `{source['name']}`{nested}")
    how = [lineage["recipe"]] if lineage.get("recipe", "first") != "first" else []
    how += [f"only {lineage['parts']}"] if lineage.get("parts", "all") != "all" else []
    how += ["without LayerNorms"] if not lineage.get("layernorms", True) else []
    return " and ".join(parts) + (f" ({', '.join(how)})" if how else "")


def ranges(numbers: list[int]) -> str:
    """`0–2, 5` from [0, 1, 2, 5]; in the order given."""
    runs = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def shown(value) -> str:
    """A fact in a table."""
    if value is None:
        return "–"
    return (
        f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )
