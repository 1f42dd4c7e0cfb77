"""The text that every Python carries, the corpus of the demo. It needs no network, and is the same for all
installations of one Python version, but for one file of 2 kB that names the installation's folder.

A document is a help topic, or a module's docstrings or source. A hash of the module's name puts both into
training or both into validation.
"""

import ast
import contextlib
import hashlib
import operator
import os
import platform
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator

from inheritune.data.sources import Source, files_under
from inheritune.data.text_files import Piece

LITERAL = re.compile(r"\s*[\[(]?[-\"'\\\d]|\s*b[\"']")  # how a line of a table in source code begins


def open_python() -> Source:
    """The corpus, in the order of the hashes of the documents' names. One name in ten is for validation, the
    same in every version of Python."""
    documents = [
        (int(hashlib.sha256(name.encode()).hexdigest(), 16), text)
        for name, text in python_documentation() + python_sources()
    ]
    documents.sort(key=operator.itemgetter(0))
    pieces = [Piece([text], split="train" if number % 10 else "val") for number, text in documents]
    return Source({"corpus": f"Python {platform.python_version()}"}, iter(pieces), has_val=True)


def python_documentation() -> list[tuple[str, str]]:
    """[(name, text)]: the topics of `pydoc`'s help, and for each module of the standard library its
    docstrings, each after its name. Repeats and docstrings under 40 characters are left out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions split it off
        topics = {}
    texts = [(f"help on {topic}", text) for topic, text in sorted(topics.items())]
    seen = set()
    for module, code in standard_library():
        if entries := list(docstrings(code, module, seen)):
            texts.append((module, "\n\n".join(entries) + "\n"))
    return texts


def docstrings(code: str, name: str, seen: set[str]) -> Iterator[str]:
    """Yield name and docstring of a module and all that it defines, `seen` ones left out."""
    try:
        with warnings.catch_warnings(action="ignore"):  # old escapes in old modules
            todo = [(ast.parse(code), name)]
    except (SyntaxError, ValueError):  # a template
        return
    while todo:
        node, name = todo.pop(0)
        text = (ast.get_docstring(node) or "").strip()
        if len(text) >= 40 and text not in seen:
            seen.add(text)
            yield f"{name}\n\n{text}"
        defs = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        todo[:0] = [(child, f"{name}.{child.name}") for child in node.body if isinstance(child, defs)]


def python_sources() -> list[tuple[str, str]]:
    """[(module name, text)] of the standard library's source files. Left out are _sysconfigdata…, and files
    in which more than half of the lines begin with a number or a string: both are generated."""
    texts = []
    for module, code in standard_library():
        lines = [line for line in code.splitlines() if line.strip()]
        literals = sum(LITERAL.match(line) is not None for line in lines)
        if lines and literals <= len(lines) / 2 and not module.startswith("_sysconfigdata"):
            texts.append((module, code))
    return texts


def standard_library() -> Iterator[tuple[str, str]]:
    """Yield (module name, text) of the standard library's files without its tests, always in one order."""
    folder = sysconfig.get_path("stdlib")
    skip = ("test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__")
    for path in files_under(folder, skip):
        module, suffix = os.path.splitext(os.path.relpath(path, folder).replace(os.sep, "."))
        if suffix == ".py":
            # in the encoding that the file declares; templates are left out
            with contextlib.suppress(SyntaxError, UnicodeDecodeError), tokenize.open(path) as f:
                yield module.removesuffix(".__init__"), f.read()
