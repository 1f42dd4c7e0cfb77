"""The loss over fixed tokens: who computes what, and when it stops. pytest tests/training/test_losses.py"""

import pytest
import torch

from inheritune.training.distributed import Ranks
from inheritune.training.losses import total_nats

CPU = torch.device("cpu")


class Groups:
    """Four groups of two tokens."""

    n_groups = 4

    def batch(self, g):
        return torch.full((1, 2), g), torch.full((1, 2), g)


class Model(torch.nn.Module):
    """Its loss is the group's number; notes what it was asked."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, idx, targets):
        self.seen.append(int(idx[0, 0]))
        return idx.float().mean()


def rank_of(rank, world):
    ranks = Ranks()
    ranks.rank, ranks.world, ranks.first = rank, world, rank == 0
    ranks.sum = lambda tensor, device: tensor
    return ranks


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_without_work_repeat_the_last_group_only_with_shards(sharded):
    seen, asked = [], []
    for rank in range(3):
        model, questions = Model(), []
        total_nats(
            model,
            Groups(),
            rank_of(rank, 3),
            CPU,
            torch.float32,
            stop=lambda q=questions: q.append(1) and False,
            sharded=sharded,
        )
        seen.append(model.seen)
        asked.append(len(questions))
    assert seen == ([[0, 3], [1, 3], [2, 3]] if sharded else [[0, 3], [1], [2]])
    assert asked == [2, 2, 2], "stop() may be a collective: it is asked equally often everywhere"


def test_repeated_groups_do_not_count():
    parts = [
        total_nats(Model(), Groups(), rank_of(rank, 3), CPU, torch.float32, sharded=True) for rank in range(3)
    ]
    assert sum(parts) == 2 * (0 + 1 + 2 + 3)


def test_it_ends_between_groups_when_asked():
    model = Model()
    assert total_nats(model, Groups(), Ranks(), CPU, torch.float32, stop=lambda: len(model.seen) == 2) is None
    assert model.seen == [0, 1] and not model.training
