"""Every third-party package that a top-level file imports must be in requirements.txt, or in a named extra.

python tests/check_imports.py
"""

import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXTRA = {"wandb", "lm_eval"}  # in requirements-log.txt and requirements-eval.txt, imported only when asked for


def imported(path):
    """The top-level package names that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def main():
    """Exit with a line for every import that requirements.txt lacks."""
    required = {
        re.split(r"[=<>\[ ]", line)[0].replace("-", "_")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("inheritune/*/*.py")])
    ours = {p.stem for p in files} | {"inheritune"} | set(sys.stdlib_module_names) | EXTRA
    lacking = [
        f"{p.name} imports {name}" for p in files for name in sorted(set(imported(p))) if name not in ours | required
    ]
    used = {name for p in files for name in imported(p)}
    lacking += [f"requirements.txt names {name}, which nothing imports" for name in sorted(required - used)]
    if lacking:
        sys.exit("\n".join(lacking))
    print(f"imports of {len(files)} files: all in requirements.txt")


if __name__ == "__main__":
    main()
