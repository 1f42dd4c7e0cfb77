"""Break runs on purpose for as long as asked, and count what that costs. It must cost nothing.

python -m tests.stress.torture --seconds 900                             # or: make torture
python -m tests.stress.torture --seconds 3600 --out results/torture.md

Real processes, real signals. Each round breaks one run in one way, several times, runs the same command again
until it ends, and compares hashes with a run that nothing happened to: of the last checkpoint's weights and
optimizer and of log.csv; of everything but times for the other scripts. The time is shared evenly among the
ways.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore SIGINT,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup SIGHUP
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

import torch  # noqa: E402

from inheritune.base.files import read_json, replacing, sha256  # noqa: E402
from inheritune.weights import checkpoint  # noqa: E402
from tests.test_grow import write_recipe  # noqa: E402
from tests.test_prepare_kill import command as prepare_command  # noqa: E402
from tests.test_prepare_kill import write_inputs  # noqa: E402
from tests.test_replicate import read_results, write_config  # noqa: E402
from tests.tiny import ROOT, Forks, arguments, write_data  # noqa: E402

RUN = {"dropout": 0.2, "max_iters": 24, "keep_last": 3, "resume": "auto"}
PATIENCE = 300  # seconds until a run counts as hanging
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.json", "lineage.json")
MOMENTS = 300  # about as many as an undisturbed run of RUN passes


def run_print(out):
    """The hashes of what a finished run folder must hold."""
    last = checkpoint.find(out, prefer="latest")
    found = [os.path.basename(last), sha256(os.path.join(out, "log.csv"))]
    return found + [sha256(os.path.join(last, f"{name}.safetensors")) for name in ("model", "optimizer")]


def descendants(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            children = [int(c) for c in f.read().split()]
    except OSError:
        return []
    return children + [d for c in children for d in descendants(c)]


class Train:
    """train.py in one process, forked from one that has imported it already: a round takes about a second."""

    def __init__(self, place, rng):
        self.place, self.rng = place, rng
        self.forks = Forks()
        self.data = write_data(os.path.join(place, "data"))
        self.undisturbed = self.finish(self.new())
        began = time.perf_counter()
        self.finish(self.new())
        self.seconds = time.perf_counter() - began

    def new(self):
        self.lacks = None  # of LACKS, until the run has ended
        return tempfile.mkdtemp(dir=self.place) + "/run"

    def run(self, out, **options):
        return self.forks.train(arguments(self.data, out, **RUN), lacks=self.lacks, **options)[0]

    def finish(self, out):
        status = self.run(out)
        return run_print(out) if status == 0 else f"exit status {status}: {self.forks.said}"

    def at_moments(self, number, out):
        """A signal just before a call that changes the disk, or a training step; up to six in one run."""
        times, most = range(self.rng.randint(1, 6)), MOMENTS // 2
        return sum(self.run(out, die=self.rng.randint(1, most), number=number) != 0 for _ in times)

    def at_any_time(self, number, out):
        times, most = range(self.rng.randint(1, 6)), self.seconds
        return sum(self.run(out, seconds=self.rng.uniform(0.001, most), number=number) != 0 for _ in times)

    def asked(self, number, out):
        return self.at_moments(number, out) + self.at_any_time(number, out)

    def lacking(self, what, out):
        """All the run long, which is asked to end a few times besides."""
        self.lacks = what
        return 1 + self.at_moments(signal.SIGTERM, out)

    def full_disk(self, out):
        return sum(self.run(out, limit=int(10 ** self.rng.uniform(1, 4.9))) == 1 for _ in range(3))

    def damaged(self, out):
        """The newest checkpoint loses a file, or is cut at any place."""
        faults = 0
        for _ in range(self.rng.randint(1, 3)):
            faults += self.run(out, die=self.rng.randint(MOMENTS // 4, MOMENTS)) != 0
            steps = checkpoint.list_steps(out)
            if len(steps) > 1:
                path = os.path.join(out, steps[-1], self.rng.choice(FILES))
                if self.rng.random() < 0.2:
                    os.unlink(path)
                else:
                    os.truncate(path, self.rng.randrange(os.path.getsize(path) - 1))
                faults += 1
        return faults

    def moved(self, out):
        """The run folder is renamed and its links are gone or point nowhere."""
        faults = 1 + (self.run(out + "-before", die=self.rng.randint(MOMENTS // 4, MOMENTS)) != 0)
        os.rename(out + "-before", out)
        for name in ("latest", "best"):
            if os.path.islink(os.path.join(out, name)):
                os.unlink(os.path.join(out, name))
                faults += 1
            if self.rng.random() < 0.5:
                os.symlink("nowhere", os.path.join(out, name))
        return faults


class Processes:
    """A command line, run as a user would; a round takes as long as it takes, and seconds for every fault."""

    def __init__(self, place, rng):
        self.place, self.rng = place, rng
        began = time.perf_counter()
        self.undisturbed = self.finish(self.new())
        self.seconds = time.perf_counter() - began

    def new(self):
        return tempfile.mkdtemp(dir=self.place) + "/run"

    def begin(self, out):
        with open(out + ".txt", "a") as f:
            return subprocess.Popen(self.command(out), cwd=ROOT, stdout=f, stderr=f, start_new_session=True)

    def finish(self, out):
        process = self.begin(out)
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill_everything(process)
            status = "none: it hung"
        return self.print_of(out) if status == 0 else f"exit status {status}, see {out}.txt"

    def kill_everything(self, process):
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_somewhat(self):
        time.sleep(self.rng.uniform(0.02, 0.95) * self.seconds)

    def killed(self, out):
        """SIGKILL for the command and all its children, as when a machine is taken away."""
        faults = 0
        for _ in range(self.rng.randint(1, 3)):
            process = self.begin(out)
            self.wait_somewhat()
            self.kill_everything(process)
            faults += process.wait() == -signal.SIGKILL
        return faults

    def asked_to_end(self, out):
        """SIGTERM or SIGINT for the command alone, which sees to its children."""
        process = self.begin(out)
        self.wait_somewhat()
        process.send_signal(self.rng.choice([signal.SIGTERM, signal.SIGINT]))
        return process.wait(PATIENCE) != 0


class TwoRanks(Processes):
    def __init__(self, place, rng):
        self.data = write_data(os.path.join(place, "data"))
        super().__init__(place, rng)

    def command(self, out):
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
        changes = RUN | {"max_iters": 400, "eval_interval": 40, "batch_size": 2}
        return [sys.executable, *start, os.path.join(ROOT, "train.py"), *arguments(self.data, out, **changes)]

    def print_of(self, out):
        return run_print(out)

    def one_rank_killed(self, out):
        """torchrun starts both again; nobody else does anything."""
        process, faults = self.begin(out), 0
        for _ in range(2):
            self.wait_somewhat()
            if workers := descendants(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.rng.choice(workers), signal.SIGKILL)
                    faults += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        self.kill_everything(process)
        return faults


class Grow(Processes):
    def command(self, out):
        recipe, _ = write_recipe(pathlib.Path(out).parent, k_start=2)  # the same each time
        return [sys.executable, os.path.join(ROOT, "grow.py"), recipe]

    def print_of(self, out):
        out = os.path.join(os.path.dirname(out), "out")
        arms = read_json(os.path.join(out, "results.json"))["runs"]
        return [arms, [run_print(os.path.join(out, a["folder"])) for a in arms]]


class Replicate(Processes):
    def command(self, out):
        config = write_config(pathlib.Path(out).parent, arms="inheritune:1 random:1 stacking:1 kd:1")
        return [sys.executable, os.path.join(ROOT, "replicate.py"), config]

    def print_of(self, out):
        rows = read_results(os.path.dirname(out) + "/results").values()
        return sorted(str(row | {"settings_hash": ""}) for row in rows)  # (it depends on the data's path)


class Prepare(Processes):
    def __init__(self, place, rng):
        self.inputs = pathlib.Path(place) / "inputs"
        write_inputs(self.inputs)
        super().__init__(place, rng)

    def command(self, out):
        return prepare_command(self.inputs, out, 2)

    def print_of(self, out):
        return {str(p.relative_to(out)): sha256(p) for p in pathlib.Path(out).rglob("*") if p.is_file()}


KINDS = (  # what is done to whom: the name of a method, and what it takes besides the run folder
    ("train.py: SIGKILL before a disk operation or a step", Train, "at_moments", signal.SIGKILL),
    ("train.py: SIGKILL at any time", Train, "at_any_time", signal.SIGKILL),
    ("train.py: SIGTERM", Train, "asked", signal.SIGTERM),
    ("train.py: SIGINT", Train, "asked", signal.SIGINT),
    ("train.py: SIGHUP (as from a closed terminal)", Train, "asked", signal.SIGHUP),
    ("train.py: SIGUSR1 (as from Slurm)", Train, "asked", signal.SIGUSR1),
    ("train.py: nothing can be deleted (simulated), SIGTERM", Train, "lacking", "deleting folders"),
    ("train.py: fsync of folders fails (simulated), SIGTERM", Train, "lacking", "fsync of folders"),
    ("train.py: links cannot be made (simulated), SIGTERM", Train, "lacking", "links"),
    ("train.py: no file may grow further (as on a full disk)", Train, "full_disk"),
    ("train.py: newest checkpoint cut or incomplete", Train, "damaged"),
    ("train.py: folder moved, links lost", Train, "moved"),
    ("train.py, 2 ranks: one rank SIGKILLed, torchrun --max-restarts", TwoRanks, "one_rank_killed"),
    ("train.py, 2 ranks: everything SIGKILLed", TwoRanks, "killed"),
    ("train.py, 2 ranks: SIGTERM or SIGINT to torchrun", TwoRanks, "asked_to_end"),
    ("grow.py: everything SIGKILLed", Grow, "killed"),
    ("grow.py: SIGTERM or SIGINT", Grow, "asked_to_end"),
    ("replicate.py: everything SIGKILLed", Replicate, "killed"),
    ("replicate.py: SIGTERM or SIGINT", Replicate, "asked_to_end"),
    ("prepare.py: everything SIGKILLed", Prepare, "killed"),
    ("prepare.py: SIGTERM or SIGINT", Prepare, "asked_to_end"),
)


def one_round(victim, method, more, tally):
    """Break one run and let it end; where the end is not that of an undisturbed one, say so and keep it."""
    began, out = time.perf_counter(), victim.new()
    faults = int(getattr(victim, method)(*more, out))
    found = victim.finish(out)
    if found == victim.undisturbed:
        shutil.rmtree(os.path.dirname(out))
    else:
        what = f"{type(victim).__name__} {method} {more} {out}"
        print(f"MISMATCH: {what}\n  {found}\n  {victim.undisturbed}", flush=True)
    seconds, wrong = time.perf_counter() - began, int(found != victim.undisturbed)
    tally.update(rounds=1, faults=faults, mismatches=wrong, seconds=seconds)


def torture(seconds, seed, place, kinds=KINDS):
    """{title: Counter of rounds, faults, mismatches, seconds}; what had least time so far has its turn."""
    rng = random.Random(seed)
    tallies, victims = {kind[0]: collections.Counter() for kind in kinds}, {}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        title, kind, method, *more = min(kinds, key=lambda k: tallies[k[0]]["seconds"])
        if kind not in victims:
            folder = os.path.join(place, kind.__name__)
            os.makedirs(folder)
            victims[kind] = kind(folder, rng)
        one_round(victims[kind], method, more, tallies[title])
        rounds, done = tallies[title]["rounds"], sum(t["faults"] for t in tallies.values())
        left = max(0, end - time.perf_counter())
        print(f"{title}: round {rounds} | {done} faults in all | {left:.0f} s left", flush=True)
    return tallies


def table(tallies, command, seconds):
    lines = ["| what | rounds | faults | mismatches |", "|---|--:|--:|--:|"]
    names = ("rounds", "faults", "mismatches")
    lines += [f"| {title} | {' | '.join(str(t[name]) for name in names)} |" for title, t in tallies.items()]
    faults, bad = (sum(t[name] for t in tallies.values()) for name in names[1:])
    revision = checkpoint.environment()["git"]
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, revision {revision}"
    text = f"""# Runs that were broken on purpose

`{command}` on {machine};
{versions};
{time.strftime("%Y-%m-%d")}. A mismatch is a run whose end differs from that of an
undisturbed one: hashes of weights, optimizer and log for training, of all files or results but
times for the rest. Nothing here cuts the power: what the kernel has accepted is on disk.
"""
    end = f"faults = {faults}, seconds = {seconds:.0f}, mismatches = {bad}\n"
    return "\n".join([text, *lines, "", end])


def main():
    parser = argparse.ArgumentParser(description="Break runs on purpose, and count what that costs.")
    parser.add_argument("--seconds", type=float, default=900, help="how long, about")
    parser.add_argument("--seed", type=int, default=1, help="of what is broken when")
    parser.add_argument("--out", help="write the tally to this file too")
    args = parser.parse_args()
    place, began = tempfile.mkdtemp(prefix="torture-"), time.perf_counter()
    tallies = torture(args.seconds, args.seed, place)
    command = f"python -m tests.stress.torture --seconds {args.seconds:.0f} --seed {args.seed}"
    text = table(tallies, command, time.perf_counter() - began)
    print("\n" + text, end="")
    if args.out:
        with replacing(args.out, "w") as f:
            f.write(text)
    if any(t["mismatches"] for t in tallies.values()):
        sys.exit(f"the runs that differ are in {place}")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
