"""What several tests need: tiny data, models and checkpoints, scripts run in this process, and real kills."""

import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import traceback

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from inheritune.base.files import sha256
from inheritune.data.tokenizer import tokenizer_files
from inheritune.training import device
from inheritune.training.logs import read_rows
from inheritune.weights import checkpoint, gpt2_format
from model import GPT, GPTConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HAS_MATRIX_UNITS, DRAW_LOSSES = device.has_matrix_units, train.draw_losses
device.has_matrix_units = lambda: False  # references are in float32, whatever the CPU
train.draw_losses = lambda out_dir: None  # half a second for each of hundreds of runs
TOKENIZER = {"name": "bytes", "n_vocab": 257, "eot": 256}
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8}


def write_data(folder, train=3000, val=400, tokenizer=TOKENIZER, dtype="uint16", meta=True, high=60):
    """A data folder with learnable tokens (each follows from the one before, with noise) below `high`."""
    os.makedirs(folder, exist_ok=True)
    splits = {}
    for seed, (split, count) in enumerate({"train": train, "val": val}.items()):
        rng = np.random.default_rng(seed)
        ids = np.cumsum(rng.choice([1, 1, 1, 7], size=count)) % high
        path = os.path.join(folder, f"{split}.bin")
        ids.astype(np.dtype(dtype).newbyteorder("<")).tofile(path)
        splits[split] = {"shards": [{"file": f"{split}.bin", "tokens": count, "sha256": sha256(path)}]}
    if meta:
        with open(os.path.join(folder, "meta.json"), "w") as f:
            json.dump({"tokenizer": tokenizer, "dtype": dtype, "splits": splits}, f)
    return str(folder)


def tiny_config(**changes):
    """A GPTConfig whose sizes are all different and small."""
    sizes = {"block_size": 8, "vocab_size": 320, "n_layer": 3, "n_head": 2, "n_embd": 16}
    return GPTConfig(**sizes | {"n_vocab": 257, "tokenizer": "bytes", "eot": 256} | changes)


def tiny_model(seed=0, **changes):
    """A GPT in eval mode whose every parameter is random, LayerNorms and biases too, to tell them apart."""
    torch.manual_seed(seed)
    model = GPT(tiny_config(**changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def write_checkpoint(folder, seed=0, **changes):
    """A tiny checkpoint folder, of the model alone; returns its model."""
    model = tiny_model(seed, **changes)
    os.makedirs(folder)
    write_model(folder, model)
    return model


def write_model(folder, model, state=None, tokenizer_from=None):
    """Write a model, or the tensors `state` in its place, into a folder, in the checkpoint layout."""
    files = tokenizer_files(model.config, tokenizer_from)
    config = gpt2_format.config_json(dataclasses.asdict(model.config))
    gpt2_format.write_model(str(folder), state or hf_state(model), config, files)


def write_files(folder, files):
    """The folder, with these files: {path in it: text or bytes}."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def change_json(path, **changes):
    """Change a file's values; a value of None takes its key out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def hf_state(model):
    """The model's parameters as a state dict in Hugging Face's layout."""
    return gpt2_format.arrange(dict(model.named_parameters()), dataclasses.asdict(model.config))


def arguments(data, out, **changes):
    """A command line for train.py: twelve steps, evaluated and saved every fourth."""
    settings = {"dataset": data, "out_dir": out, **SHAPE, "batch_tokens": 64, "batch_size": 4}
    settings |= {"max_iters": 12, "eval_interval": 4, "eval_tokens": 200, "log_interval": 1}
    settings |= {"warmup_iters": 3, "learning_rate": 0.01, "min_lr": 0.001, "device": "cpu", "threads": 1}
    return [f"--{k}={v}" for k, v in (settings | changes).items() if v is not None]


def refusal(main, argv):
    """The message with which a script ends."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in argv])
    assert isinstance(end.value.code, str), "no message"
    return end.value.code


def rows(out):
    """log.csv as a list of {column: float or None}."""
    found = read_rows(os.path.join(out, "log.csv"))
    return [{k: float(v) if v else None for k, v in row.items()} for row in found]


def column(out, name):
    """One column of log.csv where it has values."""
    return [r[name] for r in rows(out) if r[name] is not None]


def contents(out):
    """{path: bytes} of all that must not depend on interruptions, and {link: where it points}."""
    found = {"log.csv": open(os.path.join(out, "log.csv"), "rb").read()}
    for step in checkpoint.list_steps(out):
        for name in ("model.safetensors", "optimizer.safetensors", "config.json", "lineage.json"):
            with open(os.path.join(out, step, name), "rb") as f:
                found[f"{step}/{name}"] = f.read()
    links = {name: os.readlink(os.path.join(out, name)) for name in ("latest", "best")}
    return found | links


def cut(run, out, step):
    """A copy of a run folder as it was when the checkpoint of `step` was the newest."""
    shutil.copytree(run, out, symlinks=True)
    for name in checkpoint.list_steps(out):
        if name > checkpoint.step_name(step):
            shutil.rmtree(os.path.join(out, name))
    return out


def alike(a, b, atol=1e-5):
    """The logs, weights and moments of two run folders agree."""
    for name in ("loss", "val_loss", "grad_norm"):
        np.testing.assert_allclose(column(a, name), column(b, name), rtol=0, atol=atol)
    for name in ("model", "optimizer"):
        one, two = (load_file(os.path.join(x, "latest", f"{name}.safetensors")) for x in (a, b))
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_allclose(one[key], two[key], rtol=0, atol=atol, err_msg=key)


def same_weights(a, b):
    """Whether two models' or two state dicts' tensors are equal, bit for bit."""
    a, b = (x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def gpt2(model):
    """transformers' GPT2LMHeadModel with this model's weights, zero biases where it has none."""
    import transformers

    alike = ("vocab_size", "n_embd", "n_layer", "n_head", "scale_attn_by_inverse_layer_idx")
    sizes = {key: getattr(model.config, key) for key in alike} | {"n_positions": model.config.block_size}
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    config = transformers.GPT2Config(**sizes, **dropout, attn_implementation="eager")
    reference = transformers.GPT2LMHeadModel(config).eval()
    missing, unexpected = reference.load_state_dict(hf_state(model), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    return reference


class Forks:
    """A process that has imported train.py once and forks fresh children for every run: real processes, real
    SIGKILLs and real ranks, without five seconds of start each."""

    def __init__(self):
        env, pipe = os.environ | {"PYTHONPATH": ROOT}, subprocess.PIPE
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True)

    def train(self, argv, **options):
        """(exit status as subprocess gives it, moments passed or None) of a run of train.py with this command
        line: of rank 0, or of the first rank that failed. `said` is what it ended with, and `printed` what
        all ranks have printed.

        world: ranks
        code: Python that every rank executes first; it finds `rank`, `train` and `step`, which is train_step
        die: at which moment the child sends itself `number`. A moment is when the disk is about to change or
            a step to begin.
        seconds: after which the child sends itself `number` (SIGKILL)
        limit: the largest file in bytes that the child may write
        lacks: the key of LACKS for what its file system cannot do
        """
        request = {"argv": [str(a) for a in argv], "world": 1, "code": ""} | options
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        ended, self.printed = json.loads(self.process.stdout.readline())
        status, moments, self.said = next((end for end in ended if end[0]), ended[0])
        return status, moments

    def close(self):
        self.process.kill()  # to end by itself would take it seconds
        self.process.communicate()


def serve():
    # optimizers and model cards import these: seconds that every child would spend
    import huggingface_hub.repocard  # noqa: F401
    import torch._dynamo  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        world = request.pop("world")
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        with tempfile.TemporaryFile() as output:
            children = []
            for rank in range(world):
                reader, writer = os.pipe()
                pid = os.fork()
                if pid == 0:
                    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
                    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
                    os.environ.update({name: str(value) for name, value in place.items()})
                    for fd in (sys.stdout.fileno(), sys.stderr.fileno()):
                        os.dup2(output.fileno(), fd)
                    sys.stdin.close()
                    run_child(train, rank, writer, **request)
                os.close(writer)
                children.append((pid, reader))
            ended = []
            for pid, reader in children:
                with os.fdopen(reader) as f:
                    passed = f.read()
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                ended.append([status, *(json.loads(passed) if passed else [None, None])])
            output.seek(0)
            print(json.dumps([ended, output.read().decode()]), flush=True)


def run_child(
    train, rank, writer, argv, code, die=None, seconds=None, number=signal.SIGKILL, limit=None, lacks=None
):
    """train.main(argv) under the options of Forks.train; ends this process."""
    if lacks:
        take_away(lacks)
    exec(textwrap.dedent(code), {"rank": rank, "train": train, "step": train.train_step})
    moments = count_moments(train, die, number)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if seconds:
        wait = threading.Timer(seconds, os.kill, (os.getpid(), number))
        wait.daemon = True
        wait.start()
    status, said = 1, None
    try:
        train.main(argv)
        status = 0
    except SystemExit as e:
        status, said = (e.code, None) if isinstance(e.code, int) else (1, e.code)
    except BaseException:
        traceback.print_exc()
    finally:
        os.write(writer, json.dumps([moments[0], said]).encode())
        sys.stdout.flush()
        os._exit(status)


# {what a file system lacks: (the calls that fail, for which arguments, with which errors)}
LACKS = {
    "deleting folders": (  # shutil.rmtree gives dir_fd: another user's file, one that an NFS client has open
        ("unlink", "rmdir"),
        lambda *_, dir_fd=None: dir_fd is not None,
        ("EACCES", "EBUSY"),
    ),
    "fsync of folders": (
        ("fsync",),
        lambda fd: stat.S_ISDIR(os.fstat(fd).st_mode),
        ("EINVAL", "ENOTSUP", "EIO"),
    ),
    "links": (("symlink",), lambda *_: True, ("EPERM", "EPROTO", "EROFS", "EACCES")),
}


def take_away(what):
    """Let the calls of LACKS[what] fail in this process, each time with one of its errors."""
    names, concerned, errors = LACKS[what]

    def failing(call):
        def wrapped(*args, **kwargs):
            if concerned(*args, **kwargs):
                number = getattr(errno, random.choice(errors))
                raise OSError(number, os.strerror(number))
            return call(*args, **kwargs)

        return wrapped

    for name in names:
        setattr(os, name, failing(getattr(os, name)))


def count_moments(train, die, number):
    """Count each call that changes the disk and each training step; at number `die` comes a signal."""
    moments = [0]

    def counted(call):
        def wrapped(*args, **kwargs):
            moments[0] += 1
            if moments[0] == die:
                os.kill(os.getpid(), number)
            return call(*args, **kwargs)

        return wrapped

    for module, names in (
        (os, ("fsync", "rename", "replace", "symlink", "mkdir", "rmdir")),
        (train, ("train_step",)),
    ):
        for name in names:
            setattr(module, name, counted(getattr(module, name)))
    return moments


if __name__ == "__main__":
    serve()
