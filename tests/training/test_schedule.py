"""The learning rate of every step."""

import typing

import numpy as np
import pytest

from inheritune.training.schedule import learning_rate
from inheritune.training.settings import TrainSettings

SCHEDULES = typing.get_args(TrainSettings.__dataclass_fields__["schedule"].type)
COSINE = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8))
LINEAR = np.linspace(1, 0.1, 9)


@pytest.mark.parametrize(
    "settings, decay",
    [
        ({"schedule": "cosine"}, COSINE),
        ({"schedule": "linear"}, LINEAR[:8]),
        ({"schedule": "wsd", "cooldown_iters": 8}, LINEAR[:8]),
        ({"schedule": "wsd", "cooldown_iters": 4}, [1, 1, 1, 1, *LINEAR[:8:2]]),
        ({"schedule": "wsd", "cooldown_iters": 99}, LINEAR[:8]),  # warm-up comes first
        ({"schedule": "wsd"}, [1] * 6 + [1, 0.55]),  # a fifth of 12 steps
    ],
)
def test_warm_up_decay_floor_by_hand(settings, decay):
    s = TrainSettings(
        learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=12, max_iters=20, **settings
    )
    by_hand = np.concatenate(([0.2, 0.4, 0.6, 0.8], decay, np.full(8, 0.1)))
    np.testing.assert_allclose([learning_rate(i, s) for i in range(20)], by_hand, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup, decay", [(0, None), (5, 5), (5, 3), (0, 0), (20, None)])
def test_no_schedule_divides_by_zero_or_starts_at_zero(schedule, warmup, decay):
    s = TrainSettings(learning_rate=1.0, min_lr=0.1, warmup_iters=warmup, lr_decay_iters=decay, max_iters=10)
    s.schedule = schedule
    lrs = [learning_rate(i, s) for i in range(30)]
    assert all(0 < lr <= 1 for lr in lrs) and lrs[-1] == 0.1
