"""What README.md, CONTRIBUTING.md and runs/ show exists: commands, flags, files."""

import functools
import importlib
import os
import pathlib
import re

import pytest

from tests.tiny import ROOT

PATTERNS = ("*.md", "docs/*.md", "runs/*.sh", "config/*.py")
DOCS = [path for pattern in PATTERNS for path in sorted(pathlib.Path(ROOT).glob(pattern))]
COMMAND = re.compile(r"(?:python|\"\$python\"|torchrun[^\n]*?) ((?:\w+/)?\w+\.py)([^\n#`;|]*)")


@functools.cache
def flags(script):
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        said = []
        patch.setattr("argparse.ArgumentParser.print_help", lambda self: said.append(self.format_help()))
        module.main(["--help"])
    return set(re.findall(r"--[\w-]+", said[0]))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_and_their_flags_exist(path):
    text = path.read_text("utf-8").replace("\\\n", " ")
    for script, arguments in COMMAND.findall(text):
        assert os.path.exists(os.path.join(ROOT, script)), script
        shown = set(re.findall(r"(?<=\s)--[a-z][\w-]*", arguments))
        assert shown <= flags(script) if shown else True, (script, shown - flags(script))
        for config in re.findall(r"config/\w+\.py", arguments):
            assert os.path.exists(os.path.join(ROOT, config)), config


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "results/speed.md", "results/mini/README.md"]
)
def test_linked_files_exist(name):
    path = pathlib.Path(ROOT, name)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


def test_readme_names_every_command_and_is_short():
    text = pathlib.Path(ROOT, "README.md").read_text("utf-8")
    names = [path.name for path in pathlib.Path(ROOT).glob("*.py")]
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []
    assert len(text.split()) <= 2400


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("name", ["README.md", "results/mini/README.md"])
def test_readmes_results_are_those_of_the_table(name):
    """Losses are in results/mini/table.md, of several learning rates the one with most seeds, then the
    lowest; differences stand there, or in the table of another comparison."""
    found = pathlib.Path(ROOT, "results/mini/table.md").read_text("utf-8")
    titles, _, *table = rows(found)
    losses = {}  # (arm, blocks, optimizer, steps): losses with their errors
    for row in (dict(zip(titles, r, strict=False)) for r in table):
        arm, *changes = row["arm"].removeprefix("– ").split(", ")
        if all(re.match(r"lr |[\d,]+ steps|twice the steps|Muon", change) for change in changes):
            key = (arm, row["blocks"], "Muon" in changes, row["steps"])
            losses.setdefault(key, []).append((-int(row["seeds"]), row["validation loss"]))
    text = pathlib.Path(ROOT, name).read_text("utf-8")
    section = re.search(r"This is the paper's comparison.*?(?=\n## |$)", text, re.DOTALL)[0]
    (_, *steps), _, *shown = rows(section)
    for line, *cells in shown:
        arm, blocks, *muon = line.split(", ")
        for step, cell in zip(steps, cells, strict=False):
            key = (arm, blocks.removesuffix(" blocks"), bool(muon), step.removesuffix(" steps"))
            of_arm = losses.get(key)
            assert cell == (min(of_arm)[1] if of_arm else ""), (line, step)
    found = " ".join(path.read_text("utf-8") for path in pathlib.Path(ROOT, "results").rglob("table.md"))
    for number in re.findall(r"[+−-]0\.\d{4}", section):
        assert number.replace("−", "-") in found, number
