"""Does any test notice? Small mechanical faults are put into a file, one at a time, and that file's tests run.

python bench/mutants.py --out results/mutants.md       # or: make mutants; 100 faults, at most 45 minutes on 2 cores

A fault is a comparison, a constant or an operator changed, or a statement deleted. Which ones, a seed decides. Those
that survive are listed; EQUIVALENT says of some why no test could notice them.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have begun us, and so the tests, without
os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

TESTS = {
    "model.py": ["test_model.py", "test_hf.py", "test_analyze.py"],
    "data.py": ["test_data.py", "test_hostile.py"],
    "inherit.py": ["test_inherit.py", "test_recipes.py", "test_nanogpt.py", "test_bad_input.py"],
    "checkpoint.py": ["test_checkpoint.py", "test_hostile.py", "test_faults.py"],
    "train.py": ["test_train.py", "test_distill.py", "test_faults.py"],
}
# What no test can notice, by the fault's description: why.
EQUIVALENT = {}

COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def changed(node):
    """The faulty forms of one node of a syntax tree: a list, mostly empty."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        return [ast.Compare(node.left, [COMPARED[type(node.ops[0])](), *node.ops[1:]], node.comparators)]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATED and not isinstance(node.left, ast.JoinedStr):
        return [ast.BinOp(node.left, OPERATED[type(node.op)](), node.right)]
    if isinstance(node, ast.BoolOp):
        return [ast.BoolOp(OPERATED[type(node.op)](), node.values)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return [node.operand]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return [ast.Constant(not node.value)]
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return [ast.Constant(node.value + 1 if isinstance(node.value, int) else node.value * 2)]
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.Raise)) or (
        isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Constant, ast.Yield))
    ):
        return [ast.Pass()]
    if isinstance(node, ast.Return) and node.value is not None:
        return [ast.Return(ast.Constant(None))]
    return []


def places(tree):
    """Every (parent, field, index or None) in a module's functions at which a fault can be put."""
    found = []

    def walk(node):
        for field, value in ast.iter_fields(node):
            for i, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST) or isinstance(child, (ast.JoinedStr, ast.arguments)):
                    continue
                if changed(child):
                    found.append((node, field, i if isinstance(value, list) else None))
                if not isinstance(child, ast.Raise):  # what a message says is no fault of this kind
                    walk(child)

    for node in ast.walk(tree):
        if isinstance(node, ast.Module):
            for child in node.body:
                if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                    walk(child)
    return found


def mutate(source, number):
    """(description, faulty source) of fault `number` of a file's source."""
    tree = ast.parse(source)
    parent, field, i = places(tree)[number]
    old = getattr(parent, field) if i is None else getattr(parent, field)[i]
    before, line = ast.unparse(copy.deepcopy(old)), old.lineno
    new = ast.fix_missing_locations(ast.copy_location(changed(old)[0], old))
    if i is None:
        setattr(parent, field, new)
    else:
        getattr(parent, field)[i] = new
    return f"{line}: `{before}` → `{ast.unparse(new)}`", ast.unparse(tree)


class Tester:
    """A process that has imported all that is slow to import, but nothing of ours, and forks for every run of tests."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def fail(self, folder, name, seconds):
        """Do the tests of file `name` fail in this copy of the repository? None when they take too long."""
        self.process.stdin.write(json.dumps([folder, TESTS[name], seconds]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def serve():
    """The other side of Tester."""
    import hypothesis  # noqa: F401
    import pytest
    import safetensors.torch  # noqa: F401
    import tiktoken  # noqa: F401
    import torch._dynamo  # noqa: F401
    import transformers

    transformers.GPT2LMHeadModel  # noqa: B018 (imports it)
    for line in sys.stdin:
        folder, tests, seconds = json.loads(line)
        shutil.rmtree(os.path.join(folder, "tmp"), ignore_errors=True)
        os.mkdir(os.path.join(folder, "tmp"))
        child = os.fork()
        if child == 0:
            os.setsid()
            os.chdir(folder)
            os.environ.update(TMPDIR=os.path.join(folder, "tmp"))
            tempfile.tempdir = None
            output = os.open("tests.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for fd in (1, 2):
                os.dup2(output, fd)
            arguments = ["-x", "-q", "-p", "no:cacheprovider", *(os.path.join("tests", t) for t in tests)]
            os._exit(int(pytest.main(arguments) != 0))
        done = 0
        for _ in range(int(seconds / 0.05)):  # counted, not read off a clock: this may be paused with what it runs
            time.sleep(0.05)
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if not done:
            os.waitpid(child, 0)
        print(json.dumps(status != 0 if done else None), flush=True)


class Workshop:
    """Copies of the repository in which faults are tried, and Testers, one of each for each job."""

    def __init__(self, place, jobs):
        self.free = []
        for j in range(jobs):
            folder = os.path.join(place, str(j))
            subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
            self.free.append((folder, Tester()))

    def attempt(self, name, source, seconds):
        """`Tester.fail` with this source in place of the file."""
        folder, tester = self.free.pop()
        path = os.path.join(folder, name)
        with open(path, encoding="utf-8") as f:
            whole = f.read()
        try:
            with open(path, "w", encoding="utf-8") as f:
                f.write(source)
            return tester.fail(folder, name, seconds)
        finally:
            with open(path, "w", encoding="utf-8") as f:
                f.write(whole)
            self.free.append((folder, tester))


def main():
    """Command line: try the faults, print each, write the report; exit status 1 when fewer than 90 % are caught."""
    parser = argparse.ArgumentParser(description="Put faults into files and see whether their tests notice.")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=45, help="begin no fault after this long")
    parser.add_argument("--log", help="write each result to this file, and try again only what it says survived")
    parser.add_argument("--out", help="write the report to this file too")
    args = parser.parse_args()
    began = time.perf_counter()
    known = {}
    if args.log and os.path.exists(args.log):
        with open(args.log, encoding="utf-8") as f:
            known = {text: noticed for text, noticed in map(json.loads, f)}
    sources = {}
    for name in TESTS:
        sources[name] = subprocess.run(
            ["git", "show", f"HEAD:{name}"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
    every = [(name, n) for name, source in sources.items() for n in range(len(places(ast.parse(source))))]
    drawn = random.Random(args.seed).sample(every, args.count)
    place = tempfile.mkdtemp(prefix="mutants-")
    shop = Workshop(place, args.jobs)
    limits = {}
    for name, source in sources.items():
        start = time.perf_counter()
        if shop.attempt(name, source, 900) is not False:
            sys.exit(f"the tests of {name} fail without any fault: see tests.txt in {place}")
        limits[name] = 30 + 4 * (time.perf_counter() - start)
    results = {}

    def work(fault):
        name, n = fault
        if time.perf_counter() - began > args.minutes * 60:
            return
        description, source = mutate(sources[name], n)
        noticed = known.get(f"{name}:{description}", False)
        if noticed is False:  # more tests than before may notice it
            noticed = shop.attempt(name, source, limits[name])
        results[fault] = (f"{name}:{description}", noticed)
        if args.log:
            with open(args.log, "a", encoding="utf-8") as f:
                f.write(json.dumps(results[fault]) + "\n")
        word = {True: "caught", None: "caught (hangs)", False: "SURVIVED"}[noticed]
        print(f"[{len(results)}/{len(drawn)}] {word} {name}:{description}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, drawn))
    shutil.rmtree(place)
    text, share = report(results, every, args, time.perf_counter() - began)
    print("\n" + text)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as f:
            f.write(text)
    sys.exit(0 if share >= 0.9 else 1)


def report(results, every, args, seconds):
    """(Markdown, share of non-equivalent faults that were caught)."""
    survivors = [d for d, noticed in results.values() if noticed is False]
    equivalent = [d for d in survivors if d in EQUIVALENT]
    caught = len(results) - len(survivors)
    share = caught / max(1, len(results) - len(equivalent))
    lines = [
        "# Faults that tests notice",
        "",
        f"`python bench/mutants.py --count {args.count} --seed {args.seed}`: {len(results)} of {len(every)} possible "
        f"faults tried in {seconds / 60:.0f} minutes;",
        f"{caught} caught, {len(equivalent)} equivalent, {len(survivors) - len(equivalent)} missed: {share:.0%} of the "
        "non-equivalent ones caught.",
        "",
        "| file | faults tried | caught |",
        "|---|--:|--:|",
    ]
    for name in TESTS:
        mine = [noticed for (n, _), (_, noticed) in results.items() if n == name]
        lines.append(f"| {name} | {len(mine)} | {sum(noticed is not False for noticed in mine)} |")
    lines += ["", "Survivors:", ""]
    lines += [f"* {d}" + (f" (equivalent: {EQUIVALENT[d]})" if d in EQUIVALENT else "") for d in survivors]
    return "\n".join([*lines, ""]), share


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
