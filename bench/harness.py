"""What the benchmarks share: interleaved timing, memory of a process, and the rows of results/bench.csv."""

import csv
import datetime
import json
import os
import platform
import subprocess
import sys
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

CSV = os.path.join(ROOT, "results", "bench.csv")
COLUMNS = ("date", "cpu", "name", "value", "least", "most", "unit", "bar", "verdict")


def seconds(work):
    """How long work() takes, in seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def interleaved(works, rounds=5, prepare=None):
    """{name: array of seconds (rounds,)} of {name: function}: each once to warm up, then `rounds` times in
    turn, so that whatever else the machine does falls on all of them. `prepare(name)` runs before each,
    untimed."""
    times = {name: [] for name in works}
    for r in range(rounds + 1):
        for name, work in works.items():
            if prepare:
                prepare(name)
            spent = seconds(work)
            if r:
                times[name].append(spent)
    return {name: np.array(t) for name, t in times.items()}


def events(work):
    """{name: how often} of all that torch and CUDA do in work()."""
    from torch.profiler import profile

    with profile() as seen:
        work()
    return {e.key: e.count for e in seen.key_averages()}


def memory_mb(key="VmHWM"):
    """The most memory (VmHWM) this process has had resident since it began, or has now (VmRSS), in MB. Linux
    only.

    Unlike getrusage's, this peak does not begin with that of the process that started this one.
    """
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in f if line.startswith(key + ":"))


def in_own_process(script, *arguments):
    """The JSON that `python bench/SCRIPT ARGUMENTS` prints as its last line: for what must start from
    nothing."""
    command = [sys.executable, os.path.join(ROOT, "bench", script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def cpu_name():
    """The processor, as Linux calls it, and how many cores there are."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def row(name, value, unit, bar=""):
    """One result: a number, or an array with one of each round, whose median counts, with its minimum and
    maximum; bar is "<= 0.88", ">= 2" or "" for a number that is only told."""
    values, verdict = np.atleast_1d(value), ""
    value, least, most = (f"{measure(values):.4g}" for measure in (np.median, np.min, np.max))
    if len(values) == 1:
        least = most = ""
    if bar:
        sign, limit = bar.split()
        reached = float(value) <= float(limit) if sign == "<=" else float(value) >= float(limit)
        verdict = "reached" if reached else "not reached"
    today = datetime.date.today().isoformat()
    found = (today, cpu_name(), name, value, least, most, unit, bar, verdict)
    return dict(zip(COLUMNS, found, strict=True))


def read(path=CSV):
    """The rows of a CSV file, by default results/bench.csv."""
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def show(rows):
    """Print rows as a table."""
    wide = max(len(r["name"]) for r in rows)
    for r in rows:
        spread = f"{r['least']} to {r['most']}" if r["least"] else ""
        print(f"{r['name']:{wide}}  {r['value']:>9} {r['unit']:9} {spread:20} {r['bar']:>9}  {r['verdict']}")


def report(rows, path=CSV):
    """Print rows, and put them into a CSV file in place of those of the same name and processor."""
    show(rows)
    new = {(r["cpu"], r["name"]): r for r in rows}
    kept = [new.pop((r["cpu"], r["name"]), r) for r in read(path)]
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *new.values()])


def markdown(rows):
    """Print those of the rows that have a bar as the table in results/speed.md."""
    print("| measured | median | least to most | bar | |\n|---|--:|--:|--:|---|")
    for r in rows:
        if r["bar"]:
            unit = r["unit"].replace("ratio", "")
            spread = f"{r['least']} to {r['most']}" if r["least"] else ""
            print(f"| {r['name']} | {r['value']} {unit} | {spread} | {r['bar']} | {r['verdict']} |")


if __name__ == "__main__":
    markdown(read()) if "--markdown" in sys.argv else show(read())
