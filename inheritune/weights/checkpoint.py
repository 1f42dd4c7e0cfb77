"""Checkpoints and run folders.

A checkpoint is a folder: the model in Hugging Face's layout (gpt2_format.py), and for training `optimizer.safetensors`,
`state.json` (step, tokens, best loss, settings, versions, git revision, hardware) and `lineage.json` (which blocks
came from which checkpoint). `SHA256SUMS` has the hash of each file (`sha256sum -c` reads it). A run folder holds
`step_00001000/ …`, links `latest` and `best`, `log.csv` and `timing.csv`.

A folder is written under a temporary name, everything in it fsynced, then renamed: whatever is called `step_…` is
whole. Tensors are safetensors and the rest is JSON; nothing is ever unpickled.
"""

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess

import torch
from safetensors import SafetensorError, safe_open

from inheritune.base.errors import UserError
from inheritune.base.files import read_json, replacing, sha256, sync_folder, write_json
from inheritune.weights import gpt2_format
from inheritune.weights.tensors import write_tensors

STEP = re.compile(r"step_(\d{8,})")
SUMS = "SHA256SUMS"


def find(name, prefer="best", weights=True):
    """The checkpoint folder that `name` means: a checkpoint folder, a run folder, or a Hugging Face id (downloaded;
    without `weights` only its config.json). A nanoGPT ckpt.pt is given back as it is; gpt2_format.open_model opens it.

    Of a run folder it is the link `prefer` ("best" or "latest") where that exists, else the newest step.
    Raises UserError when there is none.
    """
    if not os.path.isdir(name):
        if os.path.isfile(name) and name.endswith(".pt"):
            return name
        if os.path.exists(name):
            raise UserError(
                f"{name} is a file; a checkpoint is a folder with config.json and model.safetensors"
            )
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
            raise UserError(f"no folder {name!r} here")
        return gpt2_format.download(name, weights)
    if os.path.exists(os.path.join(name, "config.json")):
        return name
    steps = list_steps(name)
    if not steps:
        raise UserError(
            f"{name} is neither a checkpoint (no config.json) nor a run folder that holds one (no step_…)"
        )
    linked = os.path.join(name, prefer)
    if os.path.exists(os.path.join(linked, "config.json")):
        return os.path.join(name, os.path.basename(os.path.realpath(linked)))
    return os.path.join(name, steps[-1])


def list_steps(run):
    """The names of the whole checkpoints in a run folder, oldest first."""
    if not os.path.isdir(run):
        return []
    names = [n for n in os.listdir(run) if STEP.fullmatch(n) and not os.path.islink(os.path.join(run, n))]
    return sorted(names, key=lambda n: int(STEP.fullmatch(n)[1]))


@contextlib.contextmanager
def new_folder(path, sums):
    """Yield a temporary neighbour folder to fill; on success its files' hashes are added, it is renamed to `path`, and
    the rename made durable.

    sums: a dict in which whoever fills the folder leaves the {file name: hex sha256} that it knows already; the other
    files are read for theirs. On an exception the folder is removed. Raises UserError when `path` exists: a checkpoint
    is never overwritten.
    """
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
        with replacing(os.path.join(temporary, SUMS), "w") as f:
            names = sorted(n for n in os.listdir(temporary) if n[0] != ".")
            f.writelines(f"{sums.get(n) or sha256(os.path.join(temporary, n))}  {n}\n" for n in names)
        os.rename(temporary, path)
        sync_folder(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def verify(folder):
    """Raise UserError unless every file of a checkpoint folder has the hash that its SHA256SUMS says."""
    path = os.path.join(folder, SUMS)
    if not os.path.isfile(path):
        raise UserError(f"{folder} has no {SUMS} to verify it by: only checkpoints that we wrote have one")
    with open(path, encoding="utf-8", errors="replace") as f:
        lines = [line.rstrip("\n").split("  ", 1) for line in f.read(1_000_000).splitlines()]
    for line in lines:
        if len(line) != 2 or os.path.basename(line[1]) != line[1]:
            raise UserError(f"{path} is damaged; restore it, or do without --verify")
        file = os.path.join(folder, line[1])
        if not os.path.isfile(file) or sha256(file) != line[0]:
            raise UserError(
                f"{file} is missing or not what was written (its sha256 differs): restore the folder"
            )


def read_state(folder):
    """state.json of a checkpoint folder, its values checked. Raises UserError."""
    path = os.path.join(folder, "state.json")
    state = read_json(path)
    counts = [state.get(key) for key in ("step", "bad_steps", "bad_in_a_row")]
    best = state.get("best_step"), state.get("best_val_loss")
    row = state.get("row")
    try:
        whole = all(type(n) is int and n >= 0 for n in counts) and isinstance(state["settings"], dict)
        whole = whole and (best == (None, None) or (type(best[0]) is int and isinstance(best[1], float)))
        state["row"] = {key: float(value) for key, value in row.items()}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{path} lacks a usable step, best_step, row or settings: it is damaged")
    return state


def examine(folder, hashes=False):
    """Raise UserError unless a checkpoint folder looks fit to continue a run: files, headers, sizes and shapes, and
    with `hashes` every byte."""
    gpt2_format.open_model(folder)
    read_state(folder)
    read_json(os.path.join(folder, "lineage.json"))
    path = os.path.join(folder, "optimizer.safetensors")
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("no regular file")
        safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it can start a run (--init_from) but not continue one") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged ({e})") from None
    if hashes:
        verify(folder)


def link(run, name, step):
    """Point the link `name` of a run folder at the checkpoint of `step`; relative, so the folder can be moved."""
    relink(os.path.join(run, name), step_name(step))


def relink(path, target):
    """Make `path` a link to `target` (relative to it), in place of the link that may be there, in one atomic rename."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, path)
    sync_folder(folder or ".")


def step_name(step):
    """The folder name of a checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def save(run, tensors, config, state, lineage, tokenizer_files):
    """Write `run/step_…` (the step is state["step"]) and point `latest` at it.

    tensors: {"parameter name": tensor} of a model with `config` (a dict), and {"parameter name/state name": tensor} of
    its optimizer; state: what state.json is to hold besides the environment; tokenizer_files: {file name: bytes}.
    """
    folder = os.path.join(run, step_name(state["step"]))
    sums = {}
    with new_folder(folder, sums) as temporary:
        weights = gpt2_format.arrange(tensors, config)
        sums["model.safetensors"] = gpt2_format.write_model(temporary, weights, config, tokenizer_files)
        path = os.path.join(temporary, "optimizer.safetensors")
        state_of_optimizer = {name: tensor for name, tensor in tensors.items() if "/" in name}
        sums["optimizer.safetensors"] = write_tensors(path, state_of_optimizer)
        write_json(os.path.join(temporary, "state.json"), state | environment())
        write_json(os.path.join(temporary, "lineage.json"), lineage)
    link(run, "latest", state["step"])


def set_aside(folder):
    """Rename a damaged checkpoint to step_….damaged, which nothing takes for a checkpoint."""
    aside = f"{folder}.damaged"
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)


def prune(run, keep_last, best_step):
    """Delete all but the newest `keep_last` checkpoints and the best one. Each is renamed before it is emptied, so
    that no half-deleted folder is ever taken for a checkpoint."""
    names = list_steps(run)
    for name in names[: max(0, len(names) - keep_last)]:
        if best_step is None or name != step_name(best_step):
            doomed = os.path.join(run, f".{name}.tmp")
            os.rename(os.path.join(run, name), doomed)
            shutil.rmtree(doomed)


def sweep(run):
    """Remove what a kill left half-written or half-deleted in a run folder."""
    for name in os.listdir(run):
        path = os.path.join(run, name)
        if name.startswith(".") and name.endswith(".tmp"):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)


def read_lineage(folder):
    """lineage.json of a checkpoint folder, or {} where there is none."""
    path = os.path.join(folder, "lineage.json")
    return read_json(path) if os.path.exists(path) else {}


def identify(folder):
    """What lineage.json says of a source, a folder or a ckpt.pt: name, step, size, hash of header and samples.

    Enough to tell one model from another without reading gigabytes; the name keeps two path components, no more.
    """
    if os.path.isfile(folder):
        paths = [folder]
    else:
        names = sorted(
            n for n in os.listdir(folder) if n.endswith(".safetensors") and n != "optimizer.safetensors"
        )
        paths = [os.path.join(folder, n) for n in names]
    files = {}
    for path in paths:
        size, digest = os.path.getsize(path), hashlib.sha256()
        with open(path, "rb") as f:
            if path.endswith(".safetensors"):
                digest.update(f.read(int.from_bytes(f.read(8), "little")))
            for i in range(64):
                f.seek(size * i // 64)
                digest.update(f.read(1024))
        files[os.path.basename(path)] = {"bytes": size, "sample_sha256": digest.hexdigest()}
    state = os.path.join(folder, "state.json")
    return {
        "name": "/".join(os.path.abspath(folder).split(os.sep)[-2:]),
        "step": read_json(state).get("step") if os.path.exists(state) else None,
        "files": files,
    }


def new_lineage(folder, blocks, onto=None, onto_layers=0, **how):
    """The content of lineage.json: for every block of the new model, which block of which source it was.

    how: what else a reader must know to make the model again, such as recipe and seed.
    """
    names = ["onto"] * onto_layers + ["reference"] * (len(blocks) - onto_layers)
    sources = {"reference": identify(folder) | {"lineage": read_lineage(folder)}}
    if onto:
        sources["onto"] = identify(onto) | {"lineage": read_lineage(onto)}
    return {
        "blocks": [{"from": source, "block": b} for source, b in zip(names, blocks, strict=True)],
        "embeddings_and_ln_f": "onto" if onto else "reference",
        **how,
        "sources": sources,
    }


@functools.cache
def environment():
    """Versions, git revision and hardware, for state.json: what a reader of the run will want to know.

    Asked once per process: it is the code that runs, whatever happens to the working tree later.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        git = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"]
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
