"""Temporal differences: targets, loss and normalisation of gvm_td.py, against loops and closed forms."""

import pytest
import torch
from random_tensors import NAN, noise, ragged

import gvm_td


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_td_targets_are_the_mixture_of_n_step_returns(gamma, lam):
    """G_t = (1 - lam) sum_n lam^(n-1) gamma^n Q_{t+n} + lam^(T-t) gamma^(T-t) S; V(s_1)'s is that of a t = 0
    without gamma."""
    lengths = [1, 3, 6]
    mask = ragged(lengths)
    values = noise(3, 7)
    scores = noise(3, seed=1)
    expected = torch.zeros(3, 7, dtype=torch.float64)
    for b, length in enumerate(lengths):
        q = values[b].tolist()
        s = scores[b].item()
        for t in range(length + 1):  # t = 0 is V(s_1)
            total = 0.0
            for n in range(1, length - t + 1):  # the n-step return reads Q_{t+n}
                discount = gamma ** (n if t else n - 1)
                total += (1 - lam) * lam ** (n - 1) * discount * q[t + n]
            # what remains of the weight is Monte Carlo
            expected[b, t] = total + lam ** (length - t) * gamma ** (length - max(t, 1)) * s
    got = gvm_td.td_targets(
        values.masked_fill(~torch.cat([mask[:, :1], mask], 1), NAN), scores, mask, gamma, lam
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_td_loss_is_the_sum_over_prompt_end_and_tokens_and_targets_carry_no_gradient():
    """Loss = sum (Q - G)^2 over T + 1 positions; d/dQ = 2 (Q - G) exactly: a gradient through G would
    differ."""
    mask = ragged([2, 4])
    values = noise(2, 5).masked_fill(~torch.cat([mask[:, :1], mask], 1), 0.0).requires_grad_()
    scores = noise(2, seed=3)
    targets = gvm_td.td_targets(values.detach(), scores, mask, 0.9, 0.5)
    loss = gvm_td.td_loss(values, scores, mask, 0.9, 0.5)
    loss.backward()
    error = values.detach() - targets
    positions = [(b, t) for b, n in enumerate((2, 4)) for t in range(n + 1)]
    assert loss.item() == pytest.approx(sum(error[p].item() ** 2 for p in positions), abs=1e-12)
    expected = torch.zeros_like(error)
    for p in positions:
        expected[p] = 2 * error[p]
    torch.testing.assert_close(values.grad, expected, rtol=0, atol=1e-12)


def test_normalise_is_batch_normalisation_of_the_valid_entries():
    """Values, gradient, mean and standard deviation equal torch's batch_norm on the valid entries alone."""
    mask = ragged([1, 3, 5])
    valid = torch.cat([mask[:, :1], mask], 1)
    weights = noise(3, 6, seed=1)
    mine = (2 + 3 * noise(3, 6)).requires_grad_()
    theirs = (2 + 3 * noise(3, 6)).requires_grad_()
    normal, mean, std = gvm_td.normalise(mine, mask)
    expected = torch.nn.functional.batch_norm(theirs[valid][:, None], None, None, training=True, eps=1e-5)[
        :, 0
    ]
    torch.testing.assert_close(normal[valid], expected, rtol=0, atol=1e-12)
    assert (normal[~valid] == 0).all()
    (normal * weights).sum().backward()
    (expected * weights[valid]).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close((mine.detach()[valid] - mean) / std, expected.detach(), rtol=0, atol=1e-12)
