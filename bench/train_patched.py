"""train.py, whose last line is JSON: compiled graphs, those after the first step, symbols, graph breaks.

python bench/train_patched.py counted <arguments of train.py>
python bench/train_patched.py alone <arguments of train.py>     as a rank of DDP or FSDP2 without others
"""

import json
import os
import sys

import harness  # noqa: F401 (it finds the other files)
import torch
from torch._dynamo.utils import counters

import train


class One(int):
    """A number of ranks that is 1, and yet more than one."""

    __eq__, __gt__, __hash__ = (lambda *_: False), (lambda *_: True), int.__hash__


def counted():
    """Let torch.compile count: [symbols of each graph], {"first": graphs after the first step}."""
    graphs, after, compile, step = [], {}, torch.compile, train.train_step

    def backend(graph, inputs):
        values = [*inputs, *(node.meta.get("example_value") for node in graph.graph.nodes)]
        graphs.append(sum(isinstance(value, torch.SymInt) for value in values))
        return torch._inductor.compile(graph, inputs)

    def step_and_count(run):
        step(run)
        after.setdefault("first", len(graphs))

    torch.compile = lambda module=None, **options: compile(module, backend=backend, **options)
    train.train_step = step_and_count
    return graphs, after


def main(patch, argv):
    if patch == "alone":
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
        train.rank_info = lambda: (0, One(1), 0)
    graphs, after = counted()
    train.main(argv)
    late, breaks = len(graphs) - after["first"], sum(counters["graph_break"].values())
    found = {"graphs": len(graphs), "graphs after the first step": late, "symbols": sum(graphs)}
    print(json.dumps(found | {"graph breaks": breaks}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
