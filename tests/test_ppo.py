"""The pure functions of ppo.py (dvpo.py holds the same text of those that both have), against loops and closed forms."""

import math

import numpy as np
import pytest
import torch
from random_tensors import INF, NAN, noise, ragged

import ppo


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_is_the_double_sum(gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, V after the last token is 0, padding is never read and gets
    0."""
    lengths = [1, 4, 6]
    mask = ragged(lengths)
    rewards = noise(3, 6)
    values = noise(3, 6, seed=1)
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for b, n in enumerate(lengths):
        v = values[b, :n].tolist() + [0.0]
        delta = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected[b, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
    dirty = [x.masked_fill(~mask, NAN) for x in (rewards, values)]
    torch.testing.assert_close(ppo.gae(*dirty, mask, gamma, lam), expected, rtol=0, atol=1e-12)


def test_whiten_reads_only_the_valid_entries():
    """Mean 0 and standard deviation 1 over valid tokens, with centre=False root mean square 1; padding, even
    NaN, is not read."""
    mask = ragged([1, 3, 5])
    x = 3 + 7 * noise(3, 5)
    clean = ppo.whiten(x, mask)
    expected = (x[mask] - np.mean(x[mask].numpy())) / np.std(x[mask].numpy())
    torch.testing.assert_close(clean[mask], expected, rtol=0, atol=1e-7)
    assert (clean[~mask] == 0).all()
    scaled = ppo.whiten(x, mask, centre=False)
    size = np.sqrt(np.mean(x[mask].numpy() ** 2))
    torch.testing.assert_close(scaled[mask], x[mask] / size, rtol=0, atol=1e-7)
    assert (scaled[~mask] == 0).all()
    for rubbish in (NAN, INF, 1e9):
        torch.testing.assert_close(ppo.whiten(x.masked_fill(~mask, rubbish), mask), clean, rtol=0, atol=0)
    assert torch.isfinite(
        ppo.whiten(torch.ones(2, 3), ragged([1, 3]))
    ).all()  # no spread is not a division by zero


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3 + 1e-9, 0.3 - 1e-9], [-5.0, -5.0]])
def test_whiten_without_centre_keeps_nearly_equal_entries_at_one(values):
    """One advantage, or several that agree, have no spread to be divided by; it does not blow them up."""
    x = torch.tensor([values], dtype=torch.float64)
    mask = torch.ones_like(x, dtype=torch.bool)
    assert (ppo.whiten(x, mask, centre=False).abs() - 1).abs().max() < 1e-6


def test_token_rewards_puts_the_score_on_each_last_token():
    """r_t = -beta kl_t, plus the score once, at the last token of each response; nothing on padding."""
    mask = ragged([1, 3], 4)
    kl = noise(2, 4)
    scores = torch.tensor([5.0, -7.0], dtype=torch.float64)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for b, n in enumerate((1, 3)):
        for t in range(n):
            expected[b, t] = -0.3 * kl[b, t].item() + (scores[b].item() if t == n - 1 else 0.0)
    torch.testing.assert_close(
        ppo.token_rewards(kl.masked_fill(~mask, NAN), scores, mask, 0.3), expected, rtol=0, atol=1e-12
    )


def test_kl_estimators_average_to_the_exact_kl_from_policy_to_reference():
    """Enumerated over tokens drawn from pi, both k1 and k3 give KL(pi || ref), not KL(ref || pi); k3 is never
    negative."""
    p = (2 * noise(6)).log_softmax(0)
    q = (2 * noise(6, seed=1)).log_softmax(0)
    exact = (p.exp() * (p - q)).sum().item()
    other = (q.exp() * (q - p)).sum().item()
    assert abs(exact - other) > 0.05  # or the direction would not be tested
    k1, k3 = ppo.kl_estimates(p[None], q[None], torch.ones(1, 6, dtype=torch.bool))
    assert (p.exp() * k1[0]).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (p.exp() * k3[0]).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (k3 >= 0).all() and (k1 < 0).any()


def test_kl_estimates_leave_padding_out_before_exp():
    """Padding of any content, -inf - -inf and an exp that overflows included, gives 0."""
    mask = ragged([1, 2], 3)
    a = noise(2, 3).masked_fill(~mask, -INF)
    b = noise(2, 3, seed=1).masked_fill(~mask, -INF)
    for x in (
        *ppo.kl_estimates(a, b, mask),
        *ppo.kl_estimates(a.masked_fill(~mask, -1e6), b.masked_fill(~mask, 0.0), mask),
    ):
        assert torch.isfinite(x).all() and (x[~mask] == 0).all()


@pytest.mark.parametrize(
    "kl, factor", [(0.1, 1.0), (0.11, 1 + 0.1 * 0.01), (0.5, 1 + 0.2 * 0.01), (0.0, 1 - 0.2 * 0.01)]
)
def test_next_beta_follows_the_kl_and_is_clipped(kl, factor):
    """1909.08593: beta rises where the KL is over its target, by at most 20 % of batch / horizon."""
    assert ppo.next_beta(0.2, kl, 0.1, 100, horizon=10_000) == pytest.approx(0.2 * factor, rel=1e-12)


def test_policy_loss_value_gradient_and_statistics_against_a_loop():
    """Sum of -min(rho A, clip(rho) A); its gradient is zero exactly where the clip holds; the log's sums are
    right."""
    mask = ragged([1, 4, 8])
    clip = 0.2
    new = (0.4 * noise(3, 8)).requires_grad_()
    old = 0.4 * noise(3, 8, seed=1)
    adv = noise(3, 8, seed=2)
    loss, sums = ppo.policy_loss(new, old, adv, mask, clip)
    loss.backward()
    total = 0.0
    expected = {"clipped": 0, "approx_kl": 0.0, "ratio": 0.0}
    grad = torch.zeros(3, 8, dtype=torch.float64)
    branches = set()
    for b, t in mask.nonzero().tolist():
        rho = math.exp(new[b, t].item() - old[b, t].item())
        a = adv[b, t].item()
        held = min(max(rho, 1 - clip), 1 + clip)
        total -= min(rho * a, held * a)
        stays = rho * a <= held * a
        grad[b, t] = -rho * a if stays else 0.0
        if abs(rho - 1) > clip:
            expected["clipped"] += 1
        expected["approx_kl"] += rho - 1 - math.log(rho)
        expected["ratio"] += rho
        branches.add((stays, rho > 1 + clip, rho < 1 - clip))
    assert len(branches) >= 4  # clipped and pessimistic cases on either side are all in the sample
    assert loss.item() == pytest.approx(total, abs=1e-12)
    torch.testing.assert_close(new.grad, grad, rtol=0, atol=1e-12)
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(expected, abs=1e-12)
    assert not any(value.requires_grad for value in sums.values())


def test_policy_loss_at_ratio_one_is_minus_the_advantage():
    """Before the first update the loss is -sum A, its gradient -A: neither half of a tie is lost."""
    mask = ragged([2, 5])
    adv = noise(2, 5)
    logprobs = noise(2, 5, seed=1).requires_grad_()
    loss, sums = ppo.policy_loss(logprobs, logprobs.detach(), adv, mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-adv[mask].sum().item(), abs=1e-12)
    torch.testing.assert_close(logprobs.grad, torch.where(mask, -adv, 0.0), rtol=0, atol=1e-12)
    found = {name: value.item() for name, value in sums.items()}
    assert found == pytest.approx({"clipped": 0, "approx_kl": 0, "ratio": 7}, abs=1e-12)


@pytest.mark.parametrize("padding", [(INF, 0.0), (-INF, -INF), (1e4, 0.0), (-1e30, 0.0)])
def test_policy_loss_padding_gives_no_nan(padding):
    """Padded positions are left out before exp: 0 * inf would be NaN in value and gradient."""
    mask = ragged([1, 3])
    adv = noise(2, 3)
    new = noise(2, 3, seed=1).masked_fill(~mask, padding[0]).requires_grad_()
    old = noise(2, 3, seed=2).masked_fill(~mask, padding[1])
    loss, sums = ppo.policy_loss(new, old, adv, mask, 0.2)
    loss.backward()
    clean, _ = ppo.policy_loss(
        new.detach().masked_fill(~mask, 0.0), old.masked_fill(~mask, 0.0), adv, mask, 0.2
    )
    assert loss.item() == clean.item()
    assert all(torch.isfinite(value) for value in sums.values())
    assert torch.isfinite(new.grad).all() and (new.grad[~mask] == 0).all()


def test_value_loss_against_a_loop():
    """Half the larger of the two squared errors, V free and V kept near its old value, over valid tokens."""
    mask = ragged([1, 3, 6])
    clip = 0.2
    new = noise(3, 6)
    old = noise(3, 6, seed=1)
    returns = noise(3, 6, seed=2)
    total = 0.0
    for b, t in mask.nonzero().tolist():
        v = new[b, t].item()
        o = old[b, t].item()
        r = returns[b, t].item()
        near = o + min(max(v - o, -clip), clip)
        total += 0.5 * max((v - r) ** 2, (near - r) ** 2)
    assert ppo.value_loss(new, old, returns, mask, clip).item() == pytest.approx(total, abs=1e-12)
