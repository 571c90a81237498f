"""The learning rate over a run."""

import math

import pytest

from common.optimizer import learning_rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_schedules(schedule):
    """Warm-up reaches the peak at its last step, never 0; then constant, or a line or a half cosine to 0 at
    `steps`."""
    rate = [learning_rate(s, 44, 2.0, 4, schedule) for s in range(45)]
    assert rate[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    for s in range(4, 45):
        x = (s - 4) / 40
        assert rate[s] == pytest.approx(
            {"constant": 2.0, "linear": 2 * (1 - x), "cosine": 1 + math.cos(math.pi * x)}[schedule]
        )
    assert learning_rate(0, 10, 2.0, 0, schedule) == pytest.approx(2.0)  # no warm-up starts at the peak


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 40, 200, 1500])
def test_every_run_reaches_its_peak(steps):
    """A warm-up that is longer than the run, as of few rows, is at most a tenth of it."""
    rates = [learning_rate(step, steps, 2.0, 150, "linear") for step in range(steps)]
    assert max(rates) == pytest.approx(2.0)
    assert rates.index(max(rates)) <= max(0, min(150, steps // 10))
