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
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have begun us, and so the tests, without

from files import replacing  # noqa: E402

TESTS = {
    "model.py": ["test_model.py", "test_hf.py"],
    "data.py": ["test_data.py"],
    "inherit.py": ["test_inherit.py", "test_recipes.py", "test_nanogpt.py"],
    "checkpoint.py": ["test_checkpoint.py", "test_faults.py"],
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


def run_tests(folder, name, seconds):
    """Do the tests of file `name` fail in this copy of the repository? None when they take too long."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header"]
    command += [os.path.join("tests", t) for t in TESTS[name]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"TMPDIR": os.path.join(folder, "tmp")}
    os.makedirs(environment["TMPDIR"], exist_ok=True)
    with open(os.path.join(folder, "tests.txt"), "w") as f:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=f, stderr=f, start_new_session=True)
    try:
        return process.wait(seconds) != 0
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(environment["TMPDIR"], ignore_errors=True)


class Workshop:
    """Copies of the repository in which faults are tried, one for each job."""

    def __init__(self, place, jobs):
        self.free = []
        for j in range(jobs):
            folder = os.path.join(place, str(j))
            subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
            self.free.append(folder)

    def attempt(self, name, source, seconds):
        """`run_tests` with this source in place of the file."""
        folder = self.free.pop()
        path = os.path.join(folder, name)
        with open(path, encoding="utf-8") as f:
            whole = f.read()
        try:
            with open(path, "w", encoding="utf-8") as f:
                f.write(source)
            return run_tests(folder, name, seconds)
        finally:
            with open(path, "w", encoding="utf-8") as f:
                f.write(whole)
            self.free.append(folder)


def main():
    """Command line: try the faults, print each, write the report; exit status 1 when fewer than 90 % are caught."""
    parser = argparse.ArgumentParser(description="Put faults into files and see whether their tests notice.")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=45, help="begin no fault after this long")
    parser.add_argument("--out", help="write the report to this file too")
    args = parser.parse_args()
    began = time.perf_counter()
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
        noticed = shop.attempt(name, source, limits[name])
        results[fault] = (f"{name}:{description}", noticed)
        word = {True: "caught", None: "caught (hangs)", False: "SURVIVED"}[noticed]
        print(f"[{len(results)}/{len(drawn)}] {word} {name}:{description}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, drawn))
    shutil.rmtree(place)
    text, share = report(results, every, args, time.perf_counter() - began)
    print("\n" + text)
    if args.out:
        with replacing(args.out, "w") as f:
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
    main()
