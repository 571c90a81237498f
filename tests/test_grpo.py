"""grpo.py's and remax.py's functions against loops; their expected gradients on an enumerable world against
exact ones; ReMax's greedy half against a greedy rollout of the same policy."""

import json
import math
from itertools import product

import helpers
import pytest
import torch
from random_tensors import INF, NAN, noise, ragged
from worlds import LIMIT, MASK, RESPONSES, STATES, World, exact_gradient, kl_of, logprobs_of

import grpo
import remax
from assets import reviews
from common.batches import batch_indices
from common.data import prompt_hash, read_rows
from common.models import load_model
from common.rollout import rollout
from common.tokenization import load_tokenizer, tokenize

AGGREGATIONS = ["grpo", "dapo", "dr_grpo"]


# --- advantages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_std", [True, False])
def test_group_advantages_against_a_loop(scale_std):
    """(r - mean) / (std + 1e-4) in each group of neighbours, G - 1 in the deviation's denominator; without
    scale_std r - mean."""
    rewards = 3 * noise(12) + 1
    size = 4
    expected = []
    for first in range(0, 12, size):
        own = rewards[first : first + size].tolist()
        mean = sum(own) / size
        std = math.sqrt(sum((r - mean) ** 2 for r in own) / (size - 1))
        expected += [(r - mean) / (std + 1e-4 if scale_std else 1) for r in own]
    advantages, equal = grpo.group_advantages(rewards, size, scale_std)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-9)
    assert equal.shape == (12,) and not equal.any()


@pytest.mark.parametrize("scale_std", [True, False])
def test_a_group_of_equal_rewards_teaches_exactly_nothing(scale_std):
    """Zero, not the rounding of a mean over a tiny deviation; flagged, and its neighbours are not."""
    for value in (0.1, -0.7, 1e3 + 0.1, 0.0):
        rewards = torch.tensor([value] * 3 + [1.0, 1.0, 2.0] + [value] * 3)  # float32, as rewards are
        advantages, equal = grpo.group_advantages(rewards, 3, scale_std)
        assert equal.tolist() == [True] * 3 + [False] * 3 + [True] * 3
        assert (advantages[equal] == 0).all() and (advantages[~equal] != 0).all()


def test_remax_advantages_against_a_loop():
    """r - r_greedy - beta * (KL of this and the later tokens), of its own response alone; padding, even NaN,
    is not read."""
    lengths = [1, 3, 5]
    beta = 0.3
    mask = ragged(lengths, 6)
    rewards = noise(3)
    greedy = noise(3, seed=1)
    kl = noise(3, 6, seed=2)
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for b, n in enumerate(lengths):
        for t in range(n):
            expected[b, t] = rewards[b].item() - greedy[b].item() - beta * sum(kl[b, t:n].tolist())
    for rubbish in (NAN, INF, 7.0):
        got = remax.remax_advantages(rewards, greedy, kl.masked_fill(~mask, rubbish), mask, beta)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


# --- the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_token_weights_against_a_loop(aggregation):
    """grpo: each response weighs 1 / N, so all sum to 1; dapo: each token of the mini-batch the same, sum 1;
    dr_grpo: each token 1 / (N * limit), sum mean length / limit. None on padding."""
    lengths = [1, 4, 6]
    limit = 8
    weights = grpo.token_weights(ragged(lengths, 7), aggregation, limit)
    expected = torch.zeros(3, 7)
    for b, n in enumerate(lengths):
        for t in range(n):
            expected[b, t] = {"grpo": 1 / 3 / n, "dapo": 1 / 11, "dr_grpo": 1 / 3 / limit}[aggregation]
    torch.testing.assert_close(weights, expected)
    assert weights.sum().item() == pytest.approx(
        {"grpo": 1, "dapo": 1, "dr_grpo": 11 / 3 / limit}[aggregation]
    )
    if aggregation == "grpo":
        assert weights.sum(1).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("script", [grpo, remax])
@pytest.mark.parametrize("clip, clip_high", [(0.2, 0.2), (0.2, 0.28), (0.05, 3.0)])
def test_surrogate_against_a_loop(script, clip, clip_high):
    """Weighted sum of -min(rho A, clip(rho, 1 - clip, 1 + clip_high) A), its gradient zero exactly where the
    clip binds, and the sums for the log; padding, even NaN or -inf, is not read and gets no gradient."""
    lengths = [2, 5, 1, 4]
    mask = ragged(lengths)
    old = noise(4, 5)
    weights = noise(4, 5, seed=1).abs()
    logprobs = old + 0.4 * noise(4, 5, seed=2)
    advantages = noise(4, 1, seed=3)
    total = 0.0
    expected = {"clipped": 0, "approx_kl": 0.0, "ratio": 0.0}
    slopes = torch.zeros(4, 5, dtype=torch.float64)
    for b, n in enumerate(lengths):
        for t in range(n):
            rho = math.exp(logprobs[b, t].item() - old[b, t].item())
            a = advantages[b, 0].item()
            w = weights[b, t].item()
            held = min(max(rho, 1 - clip), 1 + clip_high)
            total -= w * min(rho * a, held * a)
            slopes[b, t] = -w * rho * a if rho * a <= held * a else 0.0
            if rho != held:
                expected["clipped"] += 1
            expected["approx_kl"] += rho - 1 - math.log(rho)
            expected["ratio"] += rho
    assert expected["clipped"] and (slopes[mask] == 0).any() and (slopes[mask] != 0).any()
    for rubbish in (0.0, NAN, -INF):
        new = logprobs.masked_fill(~mask, rubbish).requires_grad_()
        args = (weights, mask, clip, clip_high)
        loss, sums = script.surrogate_loss(new, old.masked_fill(~mask, rubbish), advantages, *args)
        assert loss.item() == pytest.approx(total, abs=1e-12)
        assert {name: value.item() for name, value in sums.items()} == pytest.approx(expected, abs=1e-9)
        assert not any(value.requires_grad for value in sums.values())
        torch.testing.assert_close(torch.autograd.grad(loss, new)[0], slopes, rtol=0, atol=1e-12)


def test_kl_estimates_against_a_loop():
    """k1 = log-ratio, k3 = exp(-k1) - 1 + k1 >= 0 (2402.03300 eq. 4); masked before exp."""
    mask = ragged([2, 4])
    logprobs = noise(2, 4)
    ref = noise(2, 4, seed=1)
    dirty = ref.masked_fill(~mask, INF)
    k1, k3 = grpo.kl_estimates(logprobs, dirty, mask)
    for b, t in product(range(2), range(4)):
        d = (ref[b, t] - logprobs[b, t]).item() if mask[b, t] else 0.0
        assert k1[b, t].item() == pytest.approx(-d) and k3[b, t].item() == pytest.approx(
            math.exp(d) - d - 1, abs=1e-12
        )
    assert (k3 >= 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_does_not_depend_on_micro_batches(aggregation):
    """Weights are of the whole mini-batch, so the loss and its gradient are the same for every way to cut it,
    each piece as narrow as its longest response."""
    lengths = [6, 1, 3, 5, 2, 4]
    mask = ragged(lengths)
    old = noise(6, 6)
    ref = noise(6, 6, seed=4)
    advantages = noise(6, 1, seed=3)
    weights = grpo.token_weights(mask, aggregation, 10).double()
    found = []
    for parts in (
        [[0, 1, 2, 3, 4, 5]],
        [[1, 4, 2], [5, 3, 0]],
        [[5], [4], [3], [2], [1], [0]],
        [[1, 2, 3, 4, 5], [0]],
    ):
        logprobs = (old + 0.3 * noise(6, 6, seed=2)).requires_grad_()
        loss = 0.0
        for at in parts:
            width = max(lengths[i] for i in at)
            new = logprobs[at, :width]
            mb_old = old[at, :width]
            mb_ref = ref[at, :width]
            mb_advantages = advantages[at]
            mb_weights = weights[at, :width]
            mb_mask = mask[at, :width]
            part = grpo.surrogate_loss(new, mb_old, mb_advantages, mb_weights, mb_mask, 0.2, 0.2)[0]
            loss = loss + part + 0.04 * (grpo.kl_estimates(new, mb_ref, mb_mask)[1] * mb_weights).sum()
        found.append((loss.detach(), torch.autograd.grad(loss, logprobs)[0]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-12)


# --- expected gradients -------------------------------------------------------------------------------------


def expected_grpo_gradient(world, size, scale_std, aggregation):
    """E[-gradient of grpo.py's loss at ratio 1] over all groups of `size` responses drawn from the policy,
    each listed. The loss is linear in the advantages, so a group's probability can be a factor of its own."""
    logits = world.logits.clone().requires_grad_()
    logprobs = logprobs_of(logits)
    groups = torch.tensor(list(product(range(len(RESPONSES)), repeat=size)))
    p = logprobs.detach().sum(1).exp()[groups].prod(1).repeat_interleave(size)
    at = groups.flatten()
    advantages, _ = grpo.group_advantages(world.scores[at], size, scale_std)
    weights = torch.cat([grpo.token_weights(MASK[group], aggregation, LIMIT) for group in groups])
    new = logprobs[at]
    loss, _ = grpo.surrogate_loss(new, new.detach(), (advantages * p)[:, None], weights, MASK[at], 0.2, 0.2)
    return -torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("size", [2, 3])
def test_grpo_gradient_is_the_exact_policy_gradient_but_for_a_factor(size):
    """Without the deviation and with dr_grpo's constant, E[gradient] = (G - 1) / G * d/dtheta E[r] / limit: a
    group's mean holds the response itself, which shrinks the gradient and turns it nowhere."""
    world = World()
    exact = exact_gradient(world, 0.0)
    assert exact.abs().max() > 0.05
    got = expected_grpo_gradient(world, size, False, "dr_grpo")
    torch.testing.assert_close(got, (size - 1) / size * exact / LIMIT, rtol=0, atol=1e-8)


def test_grpo_gradient_with_the_papers_mean_or_deviation_points_elsewhere():
    """1 / length of each response (`grpo`) and 1 / std of each group are no scale of the exact gradient; Dr.
    GRPO has neither."""
    world = World()
    exact = exact_gradient(world, 0.0).flatten()
    for scale_std, aggregation, turned in (
        (False, "dr_grpo", False),
        (False, "grpo", True),
        (True, "dr_grpo", True),
    ):
        got = expected_grpo_gradient(world, 2, scale_std, aggregation).flatten()
        cosine = torch.nn.functional.cosine_similarity(got, exact, dim=0).item()
        assert cosine < 0.999 if turned else cosine > 1 - 1e-9, (scale_std, aggregation, cosine)


def test_gradient_of_the_k3_term_is_that_of_the_other_kl():
    """In the loss, E[gradient of k3] is that of KL(pi_ref || pi) at each state the policy visits (the states
    held fixed), not that of KL(pi || pi_ref), of whose value k3 is an unbiased estimate."""
    world = World()
    logits = world.logits.clone().requires_grad_()
    logprobs = logprobs_of(logits)
    ref = logprobs_of(world.ref_logits)
    p = logprobs.detach().sum(1).exp()
    k1, k3 = grpo.kl_estimates(logprobs, ref, MASK)
    kl = (p * k1.sum(1)).sum().item()
    assert (p * k3.sum(1)).sum().item() == pytest.approx(kl, abs=1e-12) and kl > 0.05
    (got,) = torch.autograd.grad((p[:, None] * k3).sum(), logits)
    visits = torch.stack([sum(p[i] for i, y in enumerate(RESPONSES) if y[: len(s)] == s) for s in STATES])
    reverse = world.ref_logits.softmax(1) * (world.ref_logits.log_softmax(1) - logits.log_softmax(1))
    (expected,) = torch.autograd.grad((visits * reverse.sum(1)).sum(), logits)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_remax_gradient_is_the_exact_policy_gradient(beta):
    """E[A_t d log pi] over all responses = d/dtheta (E[r] - beta KL(pi || pi_ref)): the greedy response's
    reward is no function of the sample, so it does not bias, and the penalties before a token are rightly
    left out of its advantage."""
    world = World()
    logits = world.logits.clone().requires_grad_()
    logprobs = logprobs_of(logits)
    p = logprobs.detach().sum(1).exp()
    state = ()
    while state not in RESPONSES:
        state = (*state, int(world.logits[STATES.index(state)].argmax()))
    greedy = world.scores[RESPONSES.index(state)].expand(len(RESPONSES))
    advantages = remax.remax_advantages(world.scores, greedy, kl_of(world), MASK, beta)
    weights = remax.token_weights(MASK, "dr_grpo", LIMIT) * len(RESPONSES) * LIMIT * p[:, None]
    loss, _ = remax.surrogate_loss(logprobs, logprobs.detach(), advantages, weights, MASK, 0.2, 0.2)
    exact = exact_gradient(world, beta)
    assert exact.abs().max() > 0.05
    # weights are float32
    torch.testing.assert_close(-torch.autograd.grad(loss, logits)[0], exact, rtol=0, atol=1e-7)


# --- the greedy half ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(reviews.folder("policy"))


def opened(folder, tokenizer):
    args = remax.Args(precision="fp64")
    return load_model("policy", str(folder), tokenizer, args, trained=False)


def test_rollout_at_a_list_of_temperatures_is_each_prompts_own(group, tokenizer):
    """Each response is that of a call with its temperature for all: the random numbers belong to the place in
    the list; the greedy half depends on no random number and equals one of the prompts alone."""
    policy = opened(reviews.folder("policy"), tokenizer)
    prompts = [
        row["prompt_ids"]
        for row in tokenize(reviews.rows("prompts")[:40:8], tokenizer, (), 24, 16, "reviews")
    ]
    heat = [0.7, 0.0, 1.3, 1.0, 0.0]
    n = len(prompts)
    mixed = rollout(policy, tokenizer, prompts, 12, heat, (0, 1))[0]
    for i, temperature in enumerate(heat):
        assert rollout(policy, tokenizer, prompts, 12, temperature, (0, 1))[0][i] == mixed[i]
    both = rollout(policy, tokenizer, prompts * 2, 12, [0.9] * n + [0.0] * n, (0, 1))[0]
    assert both[:n] == rollout(policy, tokenizer, prompts, 12, 0.9, (0, 1))[0] != both[n:]
    assert both[n:] == rollout(policy, tokenizer, prompts, 12, 0.0, (5, 9))[0]
    assert rollout(policy, tokenizer, prompts * 2, 12, [0.9] * n + [0.0] * n, (0, 1), 3)[0] == both


def test_remax_baseline_is_the_greedy_response_of_the_current_policy(world, group, tokenizer):
    """objective/greedy_score is the mean reward of a greedy rollout of the policy before each step,
    objective/score of a sampled one, to the step's own prompts; the second step's policy is the one exported
    after the first."""
    args = helpers.ARGS["remax"] | dict(eval_every=0, precision="fp64", lr=1e-2)
    for steps in (1, 2):
        world.run("remax", **args | dict(steps=steps), run_dir=f"runs/remax-{steps}").ok()
    logged = [row for row in helpers.metrics(world.path("runs/remax-2")) if "objective/score" in row]
    rows = tokenize(
        read_rows(str(world.path("prompts.jsonl")), "prompts"), tokenizer, (), 24, 16, "prompts.jsonl"
    )
    rows.sort(key=lambda row: prompt_hash(row["prompt"], 1))
    rows = rows[args["eval_prompts"] :]
    seen = []
    for step, folder in enumerate((reviews.folder("policy"), world.path("runs/remax-1/model"))):
        policy = opened(folder, tokenizer)
        prompts = [rows[i]["prompt_ids"] for i in batch_indices(len(rows), 9, step, 0)]
        for key, temperature in (("objective/score", 1.0), ("objective/greedy_score", 0.0)):
            responses = rollout(policy, tokenizer, prompts, 16, temperature, (0, step + 1))[0]
            rewards = helpers.length_reward(None, tokenizer.batch_decode(responses, skip_special_tokens=True))
            seen.append(sum(rewards) / len(rewards))
            assert logged[step][key] == pytest.approx(seen[-1], abs=1e-6), (step, key)
    assert len(set(seen)) == 4, json.dumps(seen)
