"""The loss over fixed tokens: who computes what, and when it stops; the padded head."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inheritune.training.distributed import Ranks
from inheritune.training.losses import mean_loss, pad_head, to_device
from tests.tiny import tiny_model

CPU = torch.device("cpu")


class Groups:
    n_groups, n_targets = 4, 1

    def batch(self, g):
        return torch.full((1, 3), g)


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
    ranks.rank, ranks.world, ranks.is_first = rank, world, rank == 0
    ranks.sum = lambda tensor, device: tensor
    return ranks


def test_ranks_without_work_repeat_the_last_group_which_counts_once():
    """Forward passes and stop() may be collectives: every rank makes as many of them."""
    seen, asked, nats = [], [], []
    for rank in range(3):
        model, questions = Model(), []
        stop = lambda q=questions: q.append(1) and False  # noqa: E731
        nats.append(mean_loss(model, Groups(), rank_of(rank, 3), CPU, torch.float32, stop=stop))
        seen.append(model.seen)
        asked.append(len(questions))
    assert seen == [[0, 3], [1, 3], [2, 3]] and asked == [2, 2, 2]
    assert sum(nats) == 2 * (0 + 1 + 2 + 3)


class Products(TorchDispatchMode):
    """Notes the shapes of what matrix products return."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        if op is torch.ops.aten.mm.default:
            self.shapes.add(tuple(out.shape))
        return out

    def __enter__(self):
        self.shapes = set()
        return super().__enter__()


@pytest.mark.parametrize("half", [False, True])
def test_a_padded_head_multiplies_64s_and_gives_what_the_plain_one_does(half):
    """Logits, loss, gradients (of 257 rows, like the weight) and generated ids."""
    plain = tiny_model(vocab_size=257)
    padded = copy.deepcopy(plain)
    pad_head(padded, CPU, compiled=True)
    idx, targets = torch.randint(257, (2, 2, 8)).unbind(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        torch.testing.assert_close(padded(idx), plain(idx))
        for model in (plain, padded):
            with Products() as products:
                logits = model(idx)
                assert logits.shape == (2, 8, 257)
                torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()
            assert ((16, 257) in products.shapes) == (model is plain)
            assert ((16, 320) in products.shapes) == (model is padded)
        assert padded(idx, targets).item() == pytest.approx(plain(idx, targets).item(), rel=1e-6)
    for (name, p), q in zip(plain.named_parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=2e-2 if half else 1e-5, atol=1e-5, msg=name)
    one, two = (torch.stack(list(m.generate(idx, 9, temperature=0))) for m in (plain, padded))
    assert torch.equal(one, two)


def test_only_odd_vocabularies_are_padded_where_it_pays():
    for rows, device, compiled in ((320, "cuda", True), (257, "cpu", False)):
        model = tiny_model(vocab_size=rows)
        pad_head(model, torch.device(device), compiled)
        assert type(model.lm_head) is torch.nn.Linear


def test_a_batch_is_copied_once_and_cut_on_the_device(monkeypatch):
    """Slices before the copy would not be contiguous, and torch waits for a copy of those, pinned or not."""
    seen, to = [], torch.Tensor.to

    def copied(tensor, device, non_blocking=False):
        seen.append((device.type, non_blocking, tensor.dtype, tuple(tensor.shape), tensor.is_contiguous()))
        return to(tensor, CPU)

    monkeypatch.setattr(torch.Tensor, "to", copied)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: seen.append("pinned") or tensor)
    windows = torch.arange(60, dtype=torch.int32).view(6, 10)
    x, y = to_device(windows[2:4], torch.device("cuda"))
    assert seen == ["pinned", ("cuda", True, torch.int32, (2, 10), True)]
    assert x.tolist() == windows[2:4, :-1].tolist() and y.tolist() == windows[2:4, 1:].tolist()
    assert all(t.dtype == torch.int64 and t.is_contiguous() for t in (x, y))
