"""dpo.py's loss against loops, and the closed-form optimum of an enumerable world with Bradley-Terry
preferences."""

import math
from itertools import combinations

import helpers
import pytest
import torch
from worlds import RESPONSES, World, logprobs_of

import dpo


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_loss_against_a_loop(beta, smoothing):
    """Sum of -(1 - e) log sigmoid(m) - e log sigmoid(-m), m = beta (h_chosen - h_rejected); a gradient for
    each pair alone."""
    chosen, rejected = 5 * noise(2, 7)
    chosen.requires_grad_()
    rejected.requires_grad_()
    loss = dpo.dpo_loss(chosen, rejected, beta, smoothing)
    expected = 0.0
    slopes = []
    for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True):
        m = beta * (c - r)
        expected -= (1 - smoothing) * math.log(sigmoid(m))
        expected -= smoothing * math.log(sigmoid(-m))
        slopes.append(beta * (smoothing * sigmoid(m) - (1 - smoothing) * sigmoid(-m)))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    of_chosen, of_rejected = torch.autograd.grad(loss, (chosen, rejected))
    assert of_chosen.tolist() == pytest.approx(slopes, abs=1e-12)
    assert of_rejected.tolist() == pytest.approx([-slope for slope in slopes], abs=1e-12)


def test_default_is_no_smoothing_and_smoothing_is_the_pair_turned_round():
    """Without an argument it is the paper's loss; `label_smoothing` e mixes it with that of the turned pairs,
    1 - e to e."""
    chosen, rejected = noise(2, 7)
    plain = dpo.dpo_loss(chosen, rejected, 0.7)
    turned = dpo.dpo_loss(rejected, chosen, 0.7)
    paper = -torch.sigmoid(0.7 * (chosen - rejected)).log().sum()
    assert plain.item() == pytest.approx(paper.item())
    smoothed = dpo.dpo_loss(chosen, rejected, 0.7, 0.2)
    assert smoothed.item() == pytest.approx((0.8 * plain + 0.2 * turned).item())


def test_large_margins_stay_finite():
    """Log-ratios of long responses, thousands of nats, in float32: neither the loss nor its gradient
    overflows."""
    chosen = torch.tensor([4000.0, -4000.0], requires_grad=True)
    rejected = torch.tensor([-4000.0, 4000.0])
    loss = dpo.dpo_loss(chosen, rejected, 1.0)
    assert loss.item() == pytest.approx(8000)
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert gradient.tolist() == pytest.approx([0.0, -1.0])


def test_reaches_the_closed_form_optimum_of_an_enumerable_world():
    """All pairs of all responses, each order by its Bradley-Terry probability sigmoid(r_i - r_j): training
    ends at pi_ref exp(r / beta) / Z, total variation below 0.02 for every prompt.

    That expectation over labels is exactly what `label_smoothing` means, with each pair's own probability to
    be turned round.
    """
    beta = 0.5
    every_pair = list(combinations(range(len(RESPONSES)), 2))
    first = torch.tensor([i for i, _ in every_pair])
    second = torch.tensor([j for _, j in every_pair])
    for seed in range(2):
        world = World(seed)
        rewards = world.scores
        ref = logprobs_of(world.ref_logits).sum(1)
        optimum = (ref + rewards / beta).softmax(0)
        logits = world.ref_logits.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.1)

        def distance(logits=logits, optimum=optimum):
            """Total variation between the policy and the optimum."""
            policy = logprobs_of(logits.detach()).sum(1).exp()
            return 0.5 * (policy - optimum).abs().sum().item()

        assert distance() > 0.1
        turned = torch.sigmoid(rewards[second] - rewards[first])
        for _ in range(400):
            optimizer.zero_grad()
            h = logprobs_of(logits).sum(1) - ref
            loss = dpo.dpo_loss(h[first], h[second], beta, turned) / len(first)
            loss.backward()
            optimizer.step()
        assert distance() < 0.02


def test_first_step_by_hand(world):
    """Where the policy is the reference all margins are 0: the logged loss is log 2 whatever beta and
    smoothing; the step after it has parted the two sides."""
    args = helpers.ARGS["dpo"] | dict(
        steps=2, label_smoothing=0.3, beta=0.4, lr_schedule="constant", precision="fp64"
    )
    world.run("dpo", **args, run_dir="runs/dpo-first").ok()
    logged = helpers.metrics(world.path("runs/dpo-first"))
    first, second = (row for row in logged if "dpo/loss" in row)
    assert first["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["dpo/log_ratio_chosen"] == pytest.approx(0, abs=1e-6)
    assert first["dpo/log_ratio_rejected"] == pytest.approx(0, abs=1e-6)
    assert second["dpo/log_ratio_chosen"] > second["dpo/log_ratio_rejected"]
