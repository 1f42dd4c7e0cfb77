"""A model's blocks, one by one: what enters and leaves them, and running something else in their place."""

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

from inheritune.base.errors import UserError


def check_blocks(blocks: list[int], n: int) -> None:
    """Raise UserError unless these are blocks of a model with n."""
    missing = [i for i in blocks if not 0 <= i < n]
    if missing or not blocks:
        what = f"block {missing[0]}" if missing else "at least one block"
        raise UserError(f"asked for {what}, but the model has blocks 0 to {n - 1} ({n} layers)")


@contextlib.contextmanager
def recorded(blocks) -> Iterator[list[tuple]]:
    """Yield a list that gains (input (B, T, C), what the block returns) when a block runs."""
    calls = []

    def record(_block, args, kwargs, output):
        calls.append((args[0] if args else kwargs["hidden_states"], output))

    handles = [block.register_forward_hook(record, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def replaced(blocks, forward: Callable) -> Iterator[None]:
    """Blocks run `forward` instead of their own; they keep their attributes, which some models look at."""
    before = [vars(block).get("forward") for block in blocks]  # of a context around this one
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block, outer in zip(blocks, before, strict=True):
            del block.forward
            if outer:
                block.forward = outer


def like_output(x: Tensor, output):
    """x (B, T, C) in the form in which a block has returned `output`: by itself, or first of a tuple."""
    return type(output)((x, *output[1:])) if isinstance(output, (tuple, list)) else x
