"""Who may import whom: the layers of CONTRIBUTING.md, without cycles."""

import ast
import graphlib
import pathlib
import re
import sys

from tests.tiny import ROOT

LAYERS = {"base": 0, "data": 1, "weights": 1, "model": 2, "models": 3, "training": 4, "experiments": 5}
LAYERS |= {"command": 6}
# imported inside functions: optional (in requirements-*.txt, or missing in some Pythons), or slow and rare
EXTRA = ("lm_eval", "pydoc_data", "torch.utils.tensorboard", "transformers", "wandb", "zstandard")
SLOW = ("datasets", "huggingface_hub", "pyarrow", "requests", "tiktoken", "tokenizers", "torch.distributed")
SLOW += ("inheritune.experiments.plots",)  # with matplotlib


def sources(*patterns):
    """{module name: syntax tree} of the files that match."""
    root = pathlib.Path(ROOT)
    paths = sorted(path for pattern in patterns for path in root.glob(pattern))
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    return {name: ast.parse(path.read_text("utf-8")) for name, path in zip(names, paths, strict=True)}


CODE = sources("*.py", "inheritune/*/*.py", "tools/*.py")


def imports(tree, inside=False):
    """(what is imported, whether inside a function) of each import, by its full dotted name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", inside) for alias in node.names)
        yield from imports(node, inside or isinstance(node, (ast.FunctionDef, ast.Lambda)))


def our_module(name):
    """The module of ours that an import refers to (a.b.c, or a.b where c is a name in it), or None."""
    return name if name in CODE else name.rpartition(".")[0] if name.rpartition(".")[0] in CODE else None


def layer(module):
    part = module.split(".")[1] if module.startswith("inheritune.") else module
    return part if part in LAYERS else "command"


def violations():
    """Sentences on imports that the layers forbid."""
    for module, tree in CODE.items():
        here = layer(module)
        for name, inside in imports(tree):
            target = our_module(name)
            if target is None:
                if inside and not name.startswith(EXTRA + SLOW):
                    yield f"{module} imports {name} inside a function"
                continue
            there = layer(target)
            if there == "command" or (here != there and LAYERS[there] >= LAYERS[here]):
                yield f"{module} imports {target}"
            if inside and not name.startswith(SLOW):
                yield f"{module} imports {target} inside a function"


def test_imports_go_down_the_layers():
    assert sorted(set(violations())) == []


def test_there_are_no_cycles():
    graph = {m: {our_module(name) for name, _ in imports(tree)} - {None} for m, tree in CODE.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_bench_and_tests_do_not_import_each_other():
    for name, tree in sources("bench/*.py", "tests/**/*.py").items():
        other = {"bench": "tests", "tests": "bench"}[name.split(".")[0]]
        assert not [i for i, _ in imports(tree) if i.split(".")[0] == other], name


def test_requirements_are_what_is_imported():
    with open(f"{ROOT}/requirements.txt") as f:
        required = {re.split(r"[=<>\[ ]", line)[0].replace("-", "_") for line in f if line[0] not in "#\n"}
    found = {name.split(".")[0] for tree in CODE.values() for name, _ in imports(tree)}
    ours = {module.split(".")[0] for module in CODE}
    assert found - set(sys.stdlib_module_names) - ours - set(EXTRA) == required
