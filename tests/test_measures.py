"""Pair accuracies: statistics of token values, ties, pairs of scored rows."""

import math

import numpy as np
import pytest
from random_tensors import noise

from common import measures


def test_response_statistics_are_numpys():
    """Mean, six linearly interpolated percentiles and the last value; a one-token response has one value for
    all."""
    values = noise(37).tolist()
    got = measures.response_statistics(values)
    assert set(got) == {"mean", "p1", "p5", "p10", "p90", "p95", "p99", "last"}
    assert got["mean"] == pytest.approx(np.mean(values)) and got["last"] == values[-1]
    for p in (1, 5, 10, 90, 95, 99):
        at = p / 100 * 36  # linear interpolation between order statistics
        low = sorted(values)[math.floor(at)]
        high = sorted(values)[math.ceil(at)]
        assert got[f"p{p}"] == pytest.approx(low + (at - math.floor(at)) * (high - low))
    assert set(measures.response_statistics([0.25]).values()) == {0.25}


def test_pair_accuracy_counts_strict_wins():
    """A tie is not a win: four pairs, of which one wins, one loses and two tie."""
    chosen = [[2.0], [0.0, 1.0], [1.0], [0.0, 1.0]]
    rejected = [[1.0], [0.0, 1.0], [2.0], [1.0, 0.0, 0.5]]
    got = measures.pair_accuracy(chosen, rejected)
    assert got["mean"] == 0.25 and got["last"] == 0.5


def test_make_pairs_of_scored_rows():
    """All ordered pairs within a prompt, the better one first; equal scores and other prompts make none."""
    rows = [
        {"prompt": p, "response": str(i), "reward": r}
        for i, (p, r) in enumerate([("a", 1), ("b", 9), ("a", 2), ("a", 1)])
    ]
    pairs = [(x["response"], y["response"]) for x, y in measures.make_pairs(rows, 0.0)]
    assert sorted(pairs) == [("2", "0"), ("2", "3")]
    assert len(measures.make_pairs(rows, 1.0)) == 2 and not measures.make_pairs(rows, 1.5)  # "at least"
