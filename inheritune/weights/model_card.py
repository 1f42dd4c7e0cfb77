"""The model card (README.md) of a checkpoint folder: what it was made from, on which data, how good it is; so
that `hf upload NAME FOLDER` is all that is left to publish.

Its metadata is the hub's; under `inheritune` it has our own facts, which the cards of later models build on.
"""

import itertools
import os
import pathlib

from inheritune.base.files import replacing
from inheritune.weights.checkpoint import hub_id, read_lineage

CARD = "README.md"
INHERITED = ("license", "license_name", "license_link", "language")  # from the card of the source
FACTS = {"val_loss": "validation loss (nats/token)", "tokens": "training tokens", "data": "data"}


def write_card(folder: str, name: str, source: str | None = None, reference: dict | None = None, **facts):
    """Write the card of a checkpoint folder, or renew it.

    source: folder of the model that it was made from, whose licence and facts it takes over. facts: val_loss,
    tokens and data of its training; reference: the same of the reference.
    """
    from huggingface_hub import ModelCardData

    # what is known
    own, known, old_reference = read_card(folder)
    theirs, before, earlier = read_card(source)
    known |= facts
    reference = (before or earlier) | old_reference | (reference or {})

    # metadata
    metadata = {key: own.get(key) or theirs.get(key) for key in INHERITED}
    metadata["base_model"] = hub_id(source) or own.get("base_model") or theirs.get("base_model")
    metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["inheritune"]}
    metadata["inheritune"] = {k: v for k, v in (known | {"reference": reference}).items() if v}
    yaml = ModelCardData(**{key: value for key, value in metadata.items() if value}).to_yaml()

    # text
    trained = "" if known.get("tokens") else " Not trained since: a start for training."
    made = f"Made from {origin(read_lineage(folder))} by Inheritune (arXiv:2404.08634).{trained}\n"
    lines = ["---", yaml, "---\n", f"# {name}\n", made]
    table = ["| | this model | reference |", "| --- | ---: | ---: |"]
    for fact, title in FACTS.items():
        if fact in known or fact in reference:
            table.append(f"| {title} | {shown(known.get(fact))} | {shown(reference.get(fact))} |")
    lines += table if table[2:] else []
    with replacing(os.path.join(folder, CARD), "w") as f:
        f.write("\n".join(lines) + "\n")


def read_card(folder: str | None) -> tuple[dict, dict, dict]:
    """(metadata, the model's facts, its reference's facts) of a folder's card; {} for what is not there."""
    from huggingface_hub import ModelCard

    path = pathlib.Path(folder or "", CARD)
    if not folder or not path.is_file():
        return {}, {}, {}
    try:
        data = ModelCard(path.read_text("utf-8"), ignore_metadata_errors=True).data.to_dict()
        facts = dict(data.get("inheritune", {}))
        return data, facts, dict(facts.pop("reference", {}))
    except Exception:  # somebody else's file: treat all of it as: says nothing
        return {}, {}, {}


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
    runs = itertools.groupby(enumerate(numbers), lambda item: item[1] - item[0])
    runs = [[n for _, n in run] for _, run in runs]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def shown(value) -> str:
    """A fact in a table."""
    return {float: "{:.4f}", int: "{:,}", type(None): "–"}.get(type(value), "{}").format(value)
