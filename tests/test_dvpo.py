"""dvpo.py's own advantage, and its discounted sums."""

import torch
from random_tensors import NAN, noise, ragged

import dvpo


def test_later_rewards_is_the_discounted_sum_from_t_on():
    """dvpo's `q` advantage adds sum_{j >= t} gamma^(j - t) r_j, of its own response alone."""
    mask = ragged([2, 5])
    rewards = noise(2, 5)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for b, n in enumerate((2, 5)):
        for t in range(n):
            expected[b, t] = sum(0.9 ** (j - t) * rewards[b, j].item() for j in range(t, n))
    got = dvpo.later_rewards(rewards.masked_fill(~mask, NAN), mask, 0.9)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
