"""Checkpoints and run folders.

A checkpoint is a folder: the model in Hugging Face's layout (hf.py), and for training `optimizer.safetensors`,
`state.json` (step, tokens, best loss, settings, versions, git revision, hardware) and `lineage.json` (which blocks
came from which checkpoint). `SHA256SUMS` has the hash of each file (`sha256sum -c` reads it). A run folder holds
`step_00001000/ …`, links `latest` and `best`, `log.csv` and `timing.csv`.

A folder is written under a temporary name, everything in it fsynced, then renamed: whatever is called `step_…` is
whole. Tensors are safetensors and the rest is JSON; nothing is ever unpickled.
"""

import contextlib
import functools
import os
import platform
import re
import shutil
import subprocess

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from inheritune.base.errors import UserError
from inheritune.base.files import read_json, replacing, sha256, sync_folder, write_json
from inheritune.training.shard import like, whole
from inheritune.weights import gpt2_format as hf
from inheritune.weights.tensors import write_tensors

STEP = re.compile(r"step_(\d{8,})")
SUMS = "SHA256SUMS"
ADAMW, MUON = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)  # what each keeps for a parameter


def find(name, prefer="best", weights=True):
    """The checkpoint folder that `name` means: a checkpoint folder, a run folder, or a Hugging Face id (downloaded;
    without `weights` only its config.json). A nanoGPT ckpt.pt is given back as it is; hf.open_model opens it.

    Of a run folder it is the link `prefer` ("best" or "latest") where that exists, else the newest step.
    Raises UserError when there is none.
    """
    if not os.path.isdir(name):
        if os.path.isfile(name) and name.endswith(".pt"):
            return name
        if os.path.exists(name):
            raise UserError(f"{name} is a file; a checkpoint is a folder with config.json and model.safetensors")
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
            raise UserError(f"no folder {name!r} here")
        return hf.download(name, weights)
    if os.path.exists(os.path.join(name, "config.json")):
        return name
    steps = list_steps(name)
    if not steps:
        raise UserError(f"{name} is neither a checkpoint (no config.json) nor a run folder that holds one (no step_…)")
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
            raise UserError(f"{file} is missing or not what was written (its sha256 differs): restore the folder")


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
    hf.open_model(folder)
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


def snapshot(model, optimizer, into):
    """Copy the model's parameters and the optimizer's state to the CPU, into the dict `into`, and return it:
    {"parameter name": tensor} and {"parameter name/state name": tensor}, oriented and typed as they are.

    Tensors that `into` has from an earlier call are overwritten: memory fresh from the system costs more than copying.
    Of a sharded model every rank must ask, and one tensor at a time is put together; ranks whose `into` is None only
    lend their part.
    """
    tensors = dict(model.named_parameters()) | optimizer_tensors(model, optimizer)
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())
        if into is not None and name in into:
            into[name].copy_(tensor)
        elif into is not None:
            into[name] = tensor.to("cpu", copy=True)
    return into


def save(run, tensors, config, state, lineage, tokenizer_from=None):
    """Write `run/step_…` (the step is state["step"]) and point `latest` at it.

    tensors: a `snapshot`; config: of its model; state: what state.json is to hold besides the environment.
    """
    folder = os.path.join(run, step_name(state["step"]))
    sums = {}
    with new_folder(folder, sums) as temporary:
        sums["model.safetensors"] = hf.write_model(temporary, hf.arrange(tensors, config), config, tokenizer_from)
        path = os.path.join(temporary, "optimizer.safetensors")
        state_of_optimizer = {name: tensor for name, tensor in tensors.items() if "/" in name}
        sums["optimizer.safetensors"] = write_tensors(path, state_of_optimizer)
        write_json(os.path.join(temporary, "state.json"), state | environment())
        write_json(os.path.join(temporary, "lineage.json"), lineage)
    link(run, "latest", state["step"])


def optimizer_tensors(model, optimizer):
    """The optimizer's state as {"parameter name/state name": tensor}."""
    return {f"{name}/{key}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}


def load_optimizer(folder, model, optimizer):
    """Fill the optimizer of `model` from a checkpoint folder. Raises UserError when the file is missing, damaged, or
    another model's."""
    path = os.path.join(folder, "optimizer.safetensors")
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("no regular file")
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: this checkpoint can start a run (--init_from) but not continue one"
        ) from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged ({e}); delete the folder to go on from the checkpoint before it") from None
    parameters = dict(model.named_parameters())
    names = {p: name for name, p in parameters.items()}
    kept, ordered = {}, []
    for group in optimizer.param_groups:
        keys = MUON if "ns_steps" in group else ADAMW
        kept.update((f"{names[p]}/{key}", () if key == "step" else p.shape) for p in group["params"] for key in keys)
        ordered += [names[p] for p in group["params"]]
    state = {name: {} for name in ordered}
    for full, tensor in tensors.items():
        if kept.get(full) != tensor.shape or not tensor.is_floating_point():
            raise UserError(f"{path}: {full} {tuple(tensor.shape)} does not fit the model; it is another run's")
        name, _, key = full.rpartition("/")
        # a copy: the optimizer keeps what it is given, and this one is the file, mapped
        state[name][key] = like(tensor, parameters[name]) if tensor.dim() else tensor.clone()
    lacking = next((full for full in kept if tensors and full not in tensors), None)
    if lacking:
        raise UserError(f"{path} lacks {lacking}; it is damaged or another run's")
    packed = {i: state[name] for i, name in enumerate(ordered) if state[name]}
    optimizer.load_state_dict({"state": packed, "param_groups": optimizer.state_dict()["param_groups"]})


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


def lineage_of(folder):
    """lineage.json of a checkpoint folder, or {} where there is none."""
    path = os.path.join(folder, "lineage.json")
    return read_json(path) if os.path.exists(path) else {}


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
