"""dpo.py's loss against loops, and the closed-form optimum of an enumerable world with Bradley-Terry preferences."""

import math
from itertools import combinations

import helpers
import pytest
import torch
from test_worlds import RESPONSES, World, logprobs_of

import dpo


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_loss_against_a_loop(beta, smoothing):
    """Sum of -(1 - e) log sigmoid(m) - e log sigmoid(-m), m = beta (h_chosen - h_rejected); a gradient for each pair alone."""
    chosen, rejected = 5 * noise(2, 7)
    chosen.requires_grad_(), rejected.requires_grad_()
    loss = dpo.dpo_loss(chosen, rejected, beta, smoothing)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    margins = [beta * (c - r) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    expected = sum(
        -(1 - smoothing) * math.log(sigmoid(m)) - smoothing * math.log(sigmoid(-m)) for m in margins
    )
    assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-9)
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    slopes = [beta * (smoothing * sigmoid(m) - (1 - smoothing) * sigmoid(-m)) for m in margins]
    assert gradients[0].tolist() == pytest.approx(slopes, abs=1e-12)
    assert gradients[1].tolist() == pytest.approx([-s for s in slopes], abs=1e-12)


def test_default_is_no_smoothing_and_smoothing_is_the_pair_turned_round():
    """Without an argument it is the paper's loss; `label_smoothing` e mixes it with that of the turned pairs, 1 - e to e."""
    chosen, rejected = noise(2, 7)
    plain, turned = dpo.dpo_loss(chosen, rejected, 0.7), dpo.dpo_loss(rejected, chosen, 0.7)
    assert plain.item() == pytest.approx(-torch.sigmoid(0.7 * (chosen - rejected)).log().sum().item())
    assert dpo.dpo_loss(chosen, rejected, 0.7, 0.2).item() == pytest.approx(
        (0.8 * plain + 0.2 * turned).item()
    )


def test_large_margins_stay_finite():
    """Log-ratios of long responses, thousands of nats, in float32: neither the loss nor its gradient overflows."""
    chosen, rejected = torch.tensor([4000.0, -4000.0], requires_grad=True), torch.tensor([-4000.0, 4000.0])
    loss = dpo.dpo_loss(chosen, rejected, 1.0)
    assert loss.item() == pytest.approx(8000)
    assert torch.autograd.grad(loss, chosen)[0].tolist() == pytest.approx([0.0, -1.0])


def test_reaches_the_closed_form_optimum_of_an_enumerable_world():
    """All pairs of all responses, each order by its Bradley-Terry probability sigmoid(r_i - r_j): training ends at
    pi_ref exp(r / beta) / Z, total variation below 0.02 for every prompt.

    That expectation over labels is exactly what `label_smoothing` means, with each pair's own probability to be turned round.
    """
    worlds, beta = [World(seed) for seed in range(2)], 0.5
    first, second = (torch.tensor(side) for side in zip(*combinations(range(len(RESPONSES)), 2), strict=True))
    for world in worlds:
        rewards, ref = world.scores, logprobs_of(world.ref_logits).sum(1)
        optimum = (ref + rewards / beta).softmax(0)
        logits = world.ref_logits.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.1)
        distance = lambda: 0.5 * (logprobs_of(logits.detach()).sum(1).exp() - optimum).abs().sum().item()
        assert distance() > 0.1
        turned = torch.sigmoid(rewards[second] - rewards[first])
        for _ in range(400):
            optimizer.zero_grad()
            h = logprobs_of(logits).sum(1) - ref
            (dpo.dpo_loss(h[first], h[second], beta, turned) / len(first)).backward()
            optimizer.step()
        assert distance() < 0.02


def test_first_step_by_hand(world):
    """Where the policy is the reference all margins are 0: the logged loss is log 2 whatever beta and smoothing; the step after
    it has parted the two sides."""
    args = helpers.ARGS["dpo"] | dict(
        steps=2, label_smoothing=0.3, beta=0.4, lr_schedule="constant", precision="fp64"
    )
    world.run("dpo", **args, run_dir="runs/dpo-first").ok()
    found = [row for row in helpers.metrics(world.path("runs/dpo-first")) if "dpo/loss" in row]
    assert found[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (
        found[0]["dpo/log_ratio_chosen"] == pytest.approx(0, abs=1e-6) == found[0]["dpo/log_ratio_rejected"]
    )
    assert found[1]["dpo/log_ratio_chosen"] > found[1]["dpo/log_ratio_rejected"]
