"""Checkpoints and run folders: found by name, written whole, pruned; and where a checkpoint's blocks came
from.

A checkpoint is a folder: the model in Hugging Face's layout (gpt2_format.py), and for training
`optimizer.safetensors`, `state.json` (step, tokens, best loss, settings, versions, git revision, hardware)
and `lineage.json` (which blocks came from which checkpoint). A run folder holds `step_00001000/ …`, links
`latest` and `best`, `log.csv` and `timing.csv`.

A folder is written under a temporary name, everything in it fsynced, then renamed: whatever is called
`step_…` is complete. Tensors are safetensors and the rest is JSON; nothing is ever unpickled.
"""

import contextlib
import errno
import functools
import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator

import torch

from inheritune.base.errors import UserError
from inheritune.base.files import read_json, sync_folder, write_json
from inheritune.weights.gpt2_format import CONFIG, arrange, config_json, open_model, write_model
from inheritune.weights.tensors import read_tensors, write_tensors

NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without symbolic links
STEP = re.compile(r"step_(\d{8,})")  # frozen: checkpoint layout
OPTIMIZER, STATE, LINEAGE = "optimizer.safetensors", "state.json", "lineage.json"  # frozen: checkpoint layout
COUNTS = ("step", "bad_steps", "bad_in_a_row")  # in state.json
# what a checkpoint's folder on the hub holds besides weights
HUB_FILES = "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json"
HUB_FILES += " added_tokens.json vocab.json vocab.txt merges.txt *.model *.jinja README.md LICENSE*"


def find(name: str, prefer: str = "best", weights: bool = True) -> str:
    """The checkpoint folder that `name` means: a checkpoint folder, a run folder, or a Hugging Face id
    (downloaded; without `weights` only its configuration and tokenizer).

    In a run folder it is the link `prefer` ("best" or "latest") where that exists, else the newest step.
    """
    name = follow(name)
    if os.path.isdir(name):
        if os.path.exists(os.path.join(name, CONFIG)):
            return name
        linked = follow(os.path.join(name, prefer))
        if os.path.exists(os.path.join(linked, CONFIG)):
            return os.path.join(name, os.path.basename(os.path.realpath(linked)))
        if steps := list_steps(name):
            return os.path.join(name, steps[-1])
        what = "neither a checkpoint (no config.json) nor a run folder that holds one (no step_…)"
    elif name.endswith(".pt"):
        what = f"a pickle; nanoGPT's: convert it by python tools/convert_nanogpt.py {name} FOLDER"
    else:
        what = "a file; a checkpoint is a folder with config.json and model.safetensors"
    if os.path.exists(name):
        raise UserError(f"{name} is {what}")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise UserError(f"no folder {name!r} here")
    return download(name, weights)


def download(name: str, weights: bool) -> str:
    """Fetch a Hugging Face model (an id such as gpt2-large) and return the local folder of its files."""
    import huggingface_hub as hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # what goes wrong is said once, below
    wanted = HUB_FILES + " *.safetensors *.safetensors.index.json" * weights
    try:
        folder = hub.snapshot_download(name, allow_patterns=wanted.split())
    except Exception as e:  # the client's errors, its HTTP library's, the disk's: treat all as: not available
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(
            f"no folder {name!r} here, and the Hugging Face hub did not give it ({type(e).__name__}: "
            f"{reason:.150}); check the name and the network, or give a folder that holds config.json and "
            "model.safetensors"
        ) from None
    if weights and not glob.glob(os.path.join(glob.escape(folder), "*.safetensors")):
        raise UserError(
            f"{name} on the Hugging Face hub has no model.safetensors, perhaps only a pickle, which is never "
            "opened: convert it with transformers' save_pretrained and give that folder"
        )
    return folder


def list_steps(run: str) -> list[str]:
    """The names of the complete checkpoints in a run folder, oldest first."""
    names = os.listdir(run) if os.path.isdir(run) else []
    names = [n for n in names if STEP.fullmatch(n) and not os.path.islink(os.path.join(run, n))]
    return sorted(names, key=lambda n: int(STEP.fullmatch(n)[1]))


def step_name(step: int) -> str:
    """The folder name of a checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def save(run: str, tensors: dict, config: dict, state: dict, lineage: dict, files: dict) -> None:
    """Write `run/step_…` (the step is state["step"]) and point `latest` at it.

    tensors: {"parameter name": tensor} of a model with the configuration `config`, and {"parameter name/state
    name": tensor} of its optimizer; state: what state.json holds besides the environment; files: the
    tokenizer's, {name: bytes}. Raises OSError.
    """
    name = step_name(state["step"])
    moments = {name: tensor for name, tensor in tensors.items() if "/" in name}
    with new_folder(os.path.join(run, name)) as temporary:
        write_model(temporary, arrange(tensors, config), config_json(config), files)
        write_tensors(os.path.join(temporary, OPTIMIZER), moments)
        write_json(os.path.join(temporary, STATE), state | environment())
        write_json(os.path.join(temporary, LINEAGE), lineage)
    link(os.path.join(run, "latest"), name)


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Yield a temporary neighbour folder to fill with files that are fsynced; on success it is renamed to
    `path` and the rename made durable, on an exception it is removed. An existing `path` is refused."""
    path = os.fspath(path).rstrip("/")
    parent, name = os.path.dirname(path) or ".", os.path.basename(path)
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; choose another --out, or delete it first")
    os.makedirs(parent, exist_ok=True)
    temporary = os.path.join(parent, f".{name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
    try:
        os.mkdir(temporary)
        yield temporary
        os.rename(temporary, path)
        sync_folder(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def link(path: str, target: str) -> None:
    """Make `path` a link to `target` (relative to it) in one atomic rename, also where there is such a link
    already. Where the file system has no links, a file that holds the target takes its place."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        os.symlink(target, temporary)
    except OSError as e:
        if e.errno not in NO_LINKS:
            raise
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(target)
    os.replace(temporary, path)
    sync_folder(folder or ".")


def follow(path: str) -> str:
    """Where the file leads that `link` writes in a link's place; any other path as it is."""
    if os.path.isfile(path) and os.path.getsize(path) < 4096:
        with open(path, encoding="utf-8", errors="replace") as f:
            name = f.read()
        target = os.path.join(os.path.dirname(path), name)
        return target if name and os.path.isdir(target) else path
    return path


def examine(folder: str) -> None:
    """Raise UserError unless a checkpoint folder looks fit to continue a run: files, headers and shapes."""
    open_model(folder)
    read_state(folder)
    read_json(os.path.join(folder, LINEAGE))
    path = os.path.join(folder, OPTIMIZER)
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing: it can start a run (--init_from) but not continue one")
    read_tensors(path)


def read_state(folder: str) -> dict:
    """state.json of a checkpoint folder, its values checked."""
    path = os.path.join(folder, STATE)
    state = read_json(path)
    best = state.get("best_step"), state.get("best_val_loss")
    try:
        usable = all(type(state[key]) is int and state[key] >= 0 for key in COUNTS)
        usable = usable and (best == (None, None) or (type(best[0]), type(best[1])) == (int, float))
        usable = usable and isinstance(state["settings"], dict)
        state["row"] = {key: float(value) for key, value in state["row"].items()}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        usable = False
    if not usable:
        raise UserError(f"{path} lacks a usable step, best_step, row or settings: it is damaged")
    return state


def set_aside(folder: str) -> None:
    """Rename a damaged checkpoint to step_….damaged, which nothing takes for a checkpoint."""
    aside = f"{folder}.damaged"
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)


def prune(run: str, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best one. Each is renamed before it is
    emptied, so that no half-deleted folder is ever taken for a checkpoint."""
    for name in list_steps(run)[:-keep_last]:
        if best_step is None or name != step_name(best_step):
            doomed = os.path.join(run, f".{name}.tmp")
            os.rename(os.path.join(run, name), doomed)
            shutil.rmtree(doomed)


def sweep(run: str) -> None:
    """Remove what a kill left half-written or half-deleted in a run folder."""
    for name in os.listdir(run):
        path = os.path.join(run, name)
        if name.startswith(".") and name.endswith(".tmp"):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)


def new_lineage(folder: str, blocks: list[int], onto: str | None = None, onto_layers: int = 0, **how) -> dict:
    """lineage.json of a new model: for every block of it, which block of which source it was. With `onto`,
    the first `onto_layers` blocks come from that folder. how: what else tells how to make it again."""
    names = ["onto"] * onto_layers + ["reference"] * (len(blocks) - onto_layers)
    sources = {"reference": identify(folder) | {"lineage": read_lineage(folder)}}
    if onto:
        sources["onto"] = identify(onto) | {"lineage": read_lineage(onto)}
    return {  # frozen: checkpoint layout
        "blocks": [{"from": source, "block": b} for source, b in zip(names, blocks, strict=True)],
        "embeddings_and_ln_f": "onto" if onto else "reference",
        **how,
        "sources": sources,
    }


def read_lineage(folder: str) -> dict:
    """lineage.json of a checkpoint folder, or {} where there is none."""
    path = os.path.join(folder, LINEAGE)
    return read_json(path) if os.path.exists(path) else {}


def identify(folder: str) -> dict:
    """What lineage.json says of a source folder: name (two path components), step, and the files' sizes and
    hashes of header and samples, enough to tell one model from another without reading gigabytes."""
    files = {}
    for name in sorted(n for n in os.listdir(folder) if n.endswith(".safetensors") and n != OPTIMIZER):
        path = os.path.join(folder, name)
        size, digest = os.path.getsize(path), hashlib.sha256()
        with open(path, "rb") as f:
            digest.update(f.read(int.from_bytes(f.read(8), "little")))
            for i in range(64):
                f.seek(size * i // 64)
                digest.update(f.read(1024))
        files[name] = {"bytes": size, "sample_sha256": digest.hexdigest()}
    state = os.path.join(folder, STATE)
    return {
        "name": hub_id(folder) or "/".join(os.path.abspath(folder).split(os.sep)[-2:]),
        "step": read_json(state).get("step") if os.path.exists(state) else None,
        "files": files,
    }


def hub_id(folder: str | None) -> str | None:
    """The Hugging Face id of a folder in the hub client's cache; None of any other."""
    match = re.search(r"models--([^/]+)/snapshots/[^/]+$", os.path.abspath(folder or ""))
    return match[1].replace("--", "/", 1) if match else None


@functools.cache
def environment() -> dict:
    """Versions, git revision and hardware, for state.json; asked once per process, as the working tree may
    change while the code runs."""
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
    except (OSError, TypeError):  # another system than Linux on a PC
        cpu = platform.processor()
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "git": revision,
        "hardware": {"machine": platform.machine(), "cpu": cpu, "cpus": os.cpu_count(), "gpu": gpu},
    }
