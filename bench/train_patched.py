"""train.py where something around it is different; for bench/gpu.py, also under torchrun.

    python bench/train_patched.py PATCHES <arguments of train.py>

PATCHES, separated by commas:
    counted  the last line printed is JSON: compiled graphs, those after the first step, symbols, graph breaks
    alone    one rank joins a process group and trains with DDP or FSDP2, as if there were more
    gloo     takes NCCL's place, which refuses two ranks on one card
    oom      rank 1 asks for too much memory in its third step
"""

import json
import os
import sys

import harness  # noqa: F401 (it finds the other files)
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

import train


class One(int):
    """A number of ranks that is 1, and yet more than one."""

    __eq__, __gt__, __hash__ = (lambda *_: False), (lambda *_: True), int.__hash__


def counted():
    """Let torch.compile count: [symbols of each graph], {"first": graphs after the first step}."""
    graphs, after, compile, step = [], {}, torch.compile, train.train_step

    def compile_and_count(module=None, **options):
        def backend(graph, inputs):
            values = [*inputs, *(node.meta.get("example_value") for node in graph.graph.nodes)]
            graphs.append(sum(isinstance(value, torch.SymInt) for value in values))
            return torch._inductor.compile(graph, inputs)

        return compile(module, backend=backend, **options)

    def step_and_count(run):
        step(run)
        after.setdefault("first", len(graphs))

    torch.compile, train.train_step = compile_and_count, step_and_count
    return graphs, after


def alone():
    """Training as a rank of a world of one."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    train.rank_info = lambda: (0, One(1), 0)


def gloo():
    """Ranks that meet with gloo, also on GPUs."""
    join = dist.init_process_group
    dist.init_process_group = lambda backend, **options: join("gloo", **options)


def oom():
    """Training that runs out of memory in a step."""
    step = train.train_step

    def fail(run):
        step(run)
        if run.ranks.rank == 1 and run.state.step == 3:
            torch.empty(2**50, device=run.model.device)

    train.train_step = fail


def main(patches, argv):
    found = {patch.__name__: patch() for patch in (counted, alone, gloo, oom) if patch.__name__ in patches}
    train.main(argv)
    if "counted" in found:
        graphs, after = found["counted"]
        late, breaks = len(graphs) - after["first"], sum(counters["graph_break"].values())
        found = {"graphs": len(graphs), "graphs after the first step": late, "symbols": sum(graphs)}
        print(json.dumps(found | {"graph breaks": breaks}))


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2:])
