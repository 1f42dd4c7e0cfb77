"""Checkpoints and run folders: found by name, written whole, pruned; and the lineage that says where a
checkpoint's blocks came from.

A checkpoint is a folder that holds the model in Hugging Face's layout (for GPT-2: gpt2_format.py). For
training it also holds `optimizer.safetensors`, `state.json` (step, tokens, best loss, settings, versions,
git revision, hardware) and `lineage.json` (which block came from which checkpoint). A run folder holds the
checkpoints `step_00001000/ …`, the links `latest` and `best`, `log.csv` and `timing.csv`.

A folder called `step_…` is complete: it is filled under a temporary name, everything in it is fsynced, and
then it is renamed. Tensors are safetensors, our own files JSON; nothing is ever unpickled.
"""

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import torch

from inheritune.base.cpus import usable_cpus
from inheritune.base.errors import UserError, first_line
from inheritune.base.files import (
    deleting,
    is_locked_by_us,
    new_folder,
    read_files,
    read_json,
    read_optional,
    sync_folder,
    write_json,
)
from inheritune.weights.gpt2_format import CONFIG, INDEX, WEIGHTS, other_format, write_model
from inheritune.weights.tensors import read_tensors, write_tensors

STEP = re.compile(r"step_(\d{8,})")  # frozen: checkpoint layout
OPTIMIZER, STATE, LINEAGE = "optimizer.safetensors", "state.json", "lineage.json"  # frozen: checkpoint layout
STATE_COUNTS = ("step", "bad_steps", "bad_in_a_row", "since_best")  # in state.json
# names of what belongs to a model besides its weights, in lower case: tokenizer, chat template, licence, …
BESIDE = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
BESIDE += ["vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.model", "*.tiktoken", "*.jinja"]
BESIDE += ["chat_template.json", "generation_config.json", "license*", "licence*", "copying*", "notice*"]
BESIDE += ["use_policy*"]
TEMPLATES = "additional_chat_templates"  # a folder of *.jinja
ADAPTER = "adapter_config.json"


def find(name: str, prefer: str = "best", weights: bool = True) -> str:
    """The checkpoint folder that `name` means.

    name: a checkpoint folder; a run folder; or a Hugging Face id, which is downloaded.
    prefer: in a run folder, the link to follow ("best" or "latest"); the newest step where there is none.
    weights: False downloads only the configuration and the tokenizer.

    Raises UserError that says what `name` is instead.
    """
    name = follow(name)
    if os.path.isdir(name):
        return name if os.path.exists(os.path.join(name, CONFIG)) else find_in_run(name, prefer)
    if os.path.lexists(name) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise UserError(why_no_folder(name))
    return download(name, weights)


def find_in_run(run: str, prefer: str) -> str:
    """The checkpoint of a run folder that the link `prefer` points at, or the newest."""
    linked = follow(os.path.join(run, prefer))
    if os.path.exists(os.path.join(linked, CONFIG)):
        return os.path.join(run, os.path.basename(os.path.realpath(linked)))
    steps = list_steps(run)
    if not steps:
        what = "neither a checkpoint (no config.json) nor a run folder that holds one (no step_…)"
        hint = other_format(run)
        raise UserError(f"{run} is {what}{', ' + hint if hint else ''}")
    if os.path.lexists(linked):
        gone = f"{linked} points at a checkpoint that is gone"
        print(f"{gone}; taking the newest, {steps[-1]}", file=sys.stderr)
    return os.path.join(run, steps[-1])


def why_no_folder(name: str) -> str:
    """What is wrong with a name that is no folder, and what to do."""
    if not os.path.exists(name):
        gone = os.path.islink(name) and f"{name} is a link to {os.readlink(name)}, which is gone"
        return gone or f"no folder {name!r} here"
    if name.endswith(".pt"):
        return f"{name} is a pickle; nanoGPT's: convert it by python tools/convert_nanogpt.py {name} FOLDER"
    return f"{name} is a file; a checkpoint is a folder with config.json and model.safetensors"


def download(name: str, weights: bool) -> str:
    """Fetch a Hugging Face model by its id, such as gpt2-large; returns the local folder of its files."""
    import huggingface_hub as hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # an error is reported once, below
    wanted = [CONFIG, INDEX, "README.md", *BESIDE, *map(str.upper, BESIDE)]
    try:
        folder = hub.snapshot_download(name, allow_patterns=wanted)
        if weights:  # the shards that the index names: a repository may hold the model twice, in two forms
            shards = (read_optional(folder, INDEX) or {}).get("weight_map")
            files = sorted({*shards.values()}) if isinstance(shards, dict) else []
            folder = hub.snapshot_download(name, allow_patterns=[WEIGHTS, *files])
    except Exception as e:  # of the client, its HTTP library or the disk: the model is not available
        what = f"the Hugging Face hub did not give it ({type(e).__name__}: {first_line(e):.150})"
        cure = "check the name and the network, or give a folder that holds config.json and model.safetensors"
        if isinstance(e, hub.errors.GatedRepoError):
            cure = "accept its licence on its page on the hub, and run hf auth login"
        raise UserError(f"no folder {name!r} here, and {what}; {cure}") from None
    return folder


def files_beside(folder: str) -> dict[str, bytes]:
    """{name: bytes} of what belongs to the model in a folder besides config.json and weights: see BESIDE.

    Raises UserError where an adapter lies there, without which the model is another one.
    """
    if os.path.exists(os.path.join(folder, ADAPTER)):
        raise UserError(f"{folder} holds an adapter ({ADAPTER}): merge it first, by peft's merge_and_unload")
    names = [n for n in os.listdir(folder) if any(fnmatch(n.lower(), pattern) for pattern in BESIDE)]
    templates = os.path.join(folder, TEMPLATES)
    names += [f"{TEMPLATES}/{n}" for n in (os.listdir(templates) if os.path.isdir(templates) else [])]
    return read_files(folder, sorted(names))


def list_steps(run: str) -> list[str]:
    """The names of the complete checkpoints in a run folder, oldest first."""
    names = os.listdir(run) if os.path.isdir(run) else []
    names = [n for n in names if STEP.fullmatch(n) and not os.path.islink(os.path.join(run, n))]
    return sorted(names, key=lambda n: int(STEP.fullmatch(n)[1]))


def step_name(step: int) -> str:
    """The folder name of a checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def write_step(
    run: str, weights: dict, optimizer: dict, config: dict, state: dict, lineage: dict, files: dict
) -> None:
    """Write the checkpoint `run/step_…` and point the link `latest` at it. Raises OSError.

    weights: the model's state dict, as the folder stores it.
    optimizer: the optimizer's state, {"parameter/state": tensor}.
    config: what config.json holds.
    state: what state.json holds besides the environment; state["step"] names the folder.
    lineage: what lineage.json holds.
    files: the tokenizer's and others that belong to the model, {name: bytes}.
    """
    if not is_locked_by_us(run):
        raise UserError(f"another process has taken {run}: this one ends and leaves the folder as it is")
    name = step_name(state["step"])
    with new_folder(os.path.join(run, name)) as temporary:
        write_model(temporary, weights, config, files)
        write_tensors(os.path.join(temporary, OPTIMIZER), optimizer)
        write_json(os.path.join(temporary, STATE), state | environment())
        write_json(os.path.join(temporary, LINEAGE), lineage)
    link(os.path.join(run, "latest"), name)


def link(path: str, target: str) -> None:
    """Make `path` a symbolic link to `target` (relative to it) in one atomic rename; an old link is replaced.

    Some file systems have no links (exFAT, Google Drive in Colab), and each says so by another error. There a
    file that holds the target takes the link's place.
    """
    folder, name = os.path.split(path)
    if os.path.isdir(path) and not os.path.islink(path):
        raise UserError(f"{path} is a folder, but was a link to one (a copy without links?): delete it")
    temporary = os.path.join(folder, f".{name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        os.symlink(target, temporary)
    except OSError:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(target)
    os.replace(temporary, path)
    sync_folder(folder or ".")


def follow(path: str) -> str:
    """Resolve a file that `link` wrote in place of a symlink; other paths are returned unchanged."""
    if os.path.isfile(path) and os.path.getsize(path) < 4096:
        with open(path, encoding="utf-8", errors="replace") as f:
            name = f.read()
        target = os.path.join(os.path.dirname(path), name)
        return target if name and os.path.isdir(target) else path
    return path


def check_resumable(folder: str) -> None:
    """Raise UserError unless state.json, lineage.json and the optimizer's file can continue a run."""
    read_state(folder)
    read_json(os.path.join(folder, LINEAGE))
    path = os.path.join(folder, OPTIMIZER)
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: it can start a run (--init_from) but not continue one")
    read_tensors(path)


def read_state(folder: str) -> dict:
    """state.json of a checkpoint folder, its values checked."""
    path = os.path.join(folder, STATE)
    state = {"since_best": 0, "changes": []} | read_json(path)  # earlier versions lack these
    best = state.get("best_step"), state.get("best_val_loss")
    try:
        usable = (
            all(type(state[key]) is int and state[key] >= 0 for key in STATE_COUNTS)
            and (best == (None, None) or (type(best[0]), type(best[1])) == (int, float))
            and isinstance(state["settings"], dict)
            and isinstance(state["changes"], list)
            and all(isinstance(text, str) for text in state["changes"])
        )
        state["row"] = {key: float(value) for key, value in state["row"].items()}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        usable = False
    if not usable:
        raise UserError(f"{path} lacks a usable step, best_step, row or settings: it is damaged")
    return state


def set_aside(folder: str) -> None:
    """Rename a damaged checkpoint to step_….damaged, which nothing takes for a checkpoint."""
    aside = f"{folder}.damaged"
    while os.path.lexists(aside):
        aside += "_"
    os.rename(folder, aside)


def prune(run: str, keep_last: int, best_step: int | None) -> None:
    """Delete all checkpoints but the newest `keep_last` and the best one.

    Each is renamed before it is emptied, so that no half-deleted folder is ever taken for a checkpoint.
    """
    for name in list_steps(run)[:-keep_last]:
        if best_step is None or name != step_name(best_step):
            path, doomed = os.path.join(run, name), os.path.join(run, f".{name}.tmp")
            with deleting(path):
                os.rename(path, doomed)
                shutil.rmtree(doomed)


def sweep(run: str) -> None:
    """Delete what a kill left half-written or half-deleted in a run folder."""
    for name in os.listdir(run):
        path = os.path.join(run, name)
        if name.startswith(".") and name.endswith(".tmp"):
            with deleting(path):
                shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)


def new_lineage(
    folder: str, blocks: list[int], onto: str | None = None, onto_layers: int = 0, warning="", **notes
) -> dict:
    """lineage.json of a new model: which block of which source each of its blocks was.

    folder: the source of the blocks, called "reference".
    blocks: the source block of each new one.
    onto, onto_layers: the first `onto_layers` blocks come from the folder `onto` instead.
    warning: what readers of the new config.json must know; by default, a source's warning.
    notes: whatever else is needed to make the model again.
    """
    names = ["onto"] * onto_layers + ["reference"] * (len(blocks) - onto_layers)
    folders = {"reference": folder} | ({"onto": onto} if onto else {})
    sources = {key: fingerprint(path) | {"lineage": read_lineage(path)} for key, path in folders.items()}
    for source in sources.values():
        warning = warning or source["lineage"].get("warning")
    return {  # frozen: checkpoint layout
        "blocks": [{"from": source, "block": b} for source, b in zip(names, blocks, strict=True)],
        "embeddings_and_ln_f": "onto" if onto else "reference",  # but see released_slice
        **notes,
        **({"warning": warning} if warning else {}),
        "sources": sources,
    }


def read_lineage(folder: str) -> dict:
    """lineage.json of a checkpoint folder, or {} where there is none."""
    return read_optional(folder, LINEAGE) or {}


def fingerprint(folder: str) -> dict:
    """What lineage.json says of a source folder: its name (two path components), its step, and each file's
    size and a hash of its header and samples. They tell models apart without reading gigabytes."""
    files = {}
    for name in sorted(n for n in os.listdir(folder) if n.endswith(".safetensors") and n != OPTIMIZER):
        path = os.path.join(folder, name)
        size, digest = os.path.getsize(path), hashlib.sha256()
        with open(path, "rb") as f:
            header = int.from_bytes(f.read(8), "little")
            digest.update(f.read(min(header, size)))  # a Git LFS pointer names no length there
            for i in range(64):
                f.seek(size * i // 64)
                digest.update(f.read(1024))
        files[name] = {"bytes": size, "sample_sha256": digest.hexdigest()}
    return {
        "name": hub_id(folder) or "/".join(os.path.abspath(folder).split(os.sep)[-2:]),
        "step": (read_optional(folder, STATE) or {}).get("step"),
        "files": files,
    }


def hub_id(folder: str | None) -> str | None:
    """The Hugging Face id of a folder in the hub client's cache; None for any other folder."""
    match = re.search(r"models--([^/]+)/snapshots/[^/]+$", os.path.abspath(folder or ""))
    return match[1].replace("--", "/", 1) if match else None


@functools.cache
def environment() -> dict:
    """Versions, git revision and hardware, for state.json.

    Asked once per process, because the working tree may change while the code runs.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = "unknown"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = re.search(r"model name\s*: (.*)", f.read())[1]
    except (OSError, TypeError):  # not Linux on a PC
        cpu = platform.processor()
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "git": revision,
        "hardware": {"machine": platform.machine(), "cpu": cpu, "cpus": usable_cpus(), "gpu": gpu},
    }
