"""kto.py's functions against loops of the paper, its reference point against a plain model, and what its loss
tends to."""

import math
import random

import helpers
import pytest
import torch
from random_models import as_policy
from transformers import AutoModelForCausalLM
from worlds import RESPONSES, World, logprobs_of

import kto
from assets import reviews
from common.batches import batch_indices, collate
from common.data import read_rows
from common.tokenization import load_tokenizer, tokenize


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("beta, point, weights", [(0.1, 0.0, (1.0, 1.0)), (0.7, 1.3, (2.1, 0.6))])
def test_loss_against_a_loop_of_the_paper(beta, point, weights):
    """Sum of lambda_y - v (2402.01306 eq. 8), and the gradient of each response alone: -/+ lambda_y beta s (1
    - s), so a desirable response is always pushed up and an undesirable one down, most where its log-ratio is
    near the reference point."""
    log_ratios = 4 * torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([True, False, True, True, False, False, True, False, True])
    log_ratios.requires_grad_()
    loss = kto.kto_loss(log_ratios, labels, point, beta, *weights)
    expected = 0.0
    slopes = []
    for h, label in zip(log_ratios.tolist(), labels.tolist(), strict=True):
        if label:
            weight = weights[0]
            s = sigmoid(beta * (h - point))
            slopes.append(-weight * beta * s * (1 - s))
        else:
            weight = weights[1]
            s = sigmoid(beta * (point - h))
            slopes.append(weight * beta * s * (1 - s))
        expected += weight - weight * s
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, log_ratios)
    assert gradient.tolist() == pytest.approx(slopes, abs=1e-12)
    assert ((gradient < 0) == labels).all()


# --- mismatched pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1] * 5, [4, 4, 4], [20, 1], [7, 1, 2, 1], [2, 2]])
def test_mismatched_never_pairs_a_prompt_with_itself(sizes):
    """Whatever the share of each prompt, each row gets a row of another; the seed alone decides which;
    prompts may be lists."""
    prompts = []
    for x, size in enumerate(sizes):
        prompts += [[x, x]] * size
    random.Random(1).shuffle(prompts)
    for seed in range(20):
        other = kto.mismatched(prompts, seed)
        assert len(other) == len(prompts)
        assert all(0 <= j < len(prompts) for j in other)
        assert all(prompts[i] != prompts[j] for i, j in enumerate(other))
        assert other == kto.mismatched(prompts, seed)
    if len(prompts) > 3:
        different = {tuple(kto.mismatched(prompts, seed)) for seed in range(20)}
        assert len(different) > 1


def test_mismatched_uses_every_response_once_where_all_prompts_differ():
    """It is a cycle then: a permutation, so the mean over pairs is over the same responses as the data's."""
    assert sorted(kto.mismatched(list(range(50)), 3)) == list(range(50))


def test_mismatched_of_a_single_prompt_is_itself():
    assert kto.mismatched(["p"] * 3, 0) == [0, 1, 2]
    assert kto.mismatched(["p"], 0) == [0]
    assert kto.mismatched([], 0) == []


# --- what it tends to ---------------------------------------------------------------------------------------


def test_tends_to_the_majority_of_an_enumerable_world():
    """Each response is judged ten times. The expected loss is linear in sigmoid(beta (h - z)), so its optimum
    knows no degrees: all mass on the responses with lambda_D * ups > lambda_U * downs. Trained with the exact
    KL as reference point, the policy ends with more than 0.95 there, from less than 0.9; every response's
    first gradient has the majority's sign."""
    beta = 1.0
    weights = (1.5, 1.0)
    for seed in (0, 2):
        world = World(seed)
        ups = []  # of ten
        for i in range(len(RESPONSES)):
            ups.append(random.Random(100 * seed + i).choice((0, 2, 3, 5, 6, 9)))
        ups = torch.tensor(ups)
        good = weights[0] * ups > weights[1] * (10 - ups)
        at = torch.arange(len(RESPONSES)).repeat_interleave(10)
        labels = torch.arange(10).repeat(len(RESPONSES)) < ups[at]
        ref = logprobs_of(world.ref_logits).sum(1)
        logits = world.ref_logits.clone().requires_grad_()

        def mass(logits=logits, good=good):
            """What the policy puts on the responses that the majority likes."""
            policy = logprobs_of(logits.detach()).sum(1).exp()
            return policy[good].sum().item()

        h = torch.zeros(len(RESPONSES), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(kto.kto_loss(h[at], labels, 0.0, beta, *weights), h)
        assert ((slope < 0) == good).all()
        assert good.any() and not good.all()
        optimizer = torch.optim.Adam([logits], lr=0.1)
        assert mass() < 0.9
        for _ in range(200):
            optimizer.zero_grad()
            logprobs = logprobs_of(logits).sum(1)
            point = (logprobs.exp() * (logprobs - ref)).sum().clamp(min=0).detach()
            loss = kto.kto_loss((logprobs - ref)[at], labels, point, beta, *weights) / len(at)
            loss.backward()
            optimizer.step()
        assert mass() > 0.95


# --- the script ---------------------------------------------------------------------------------------------


def summed_logprobs(folder, sequences, pad):
    """log pi(y|x) [N] of a folder opened with plain transformers."""
    model = as_policy(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), pad)
    with torch.no_grad():
        return model.response_logprobs(**collate(sequences, pad, "cpu"))[0].sum(1)


@pytest.mark.parametrize("weights", [(1.0, 0.05), (0.05, 1.0)])
def test_reference_point_is_the_clamped_mean_over_mismatched_pairs(world, weights):
    """At the first step 0, and each loss half its weight. At the second it is the drift of the policy
    exported after one step on the batch's prompts with other prompts' responses where that is positive
    (thumbs up rule), else 0 (thumbs down rule)."""
    desirable, undesirable = weights
    args = helpers.ARGS["kto"] | dict(
        eval_dataset="labels.jsonl",
        eval_split="train",
        lr_schedule="constant",
        precision="fp64",
        desirable_weight=desirable,
        undesirable_weight=undesirable,
        lr=3e-4,
        batch_size=30,
    )
    for steps in (1, 2):
        world.run("kto", **args | dict(steps=steps), run_dir=f"runs/kto-{desirable}-{steps}").ok()
    logged = helpers.metrics(world.path(f"runs/kto-{desirable}-2"))
    one, two = (row for row in logged if "kto/loss" in row)

    tokenizer = load_tokenizer(reviews.folder("policy"))
    rows = read_rows(str(world.path("labels.jsonl")), "labelled")
    rows = tokenize(rows, tokenizer, ("response",), 24, 16, "labels.jsonl")
    first = batch_indices(len(rows), args["batch_size"], 0, 0)
    second = batch_indices(len(rows), args["batch_size"], 1, 0)
    assert one["kto/reference_point"] == pytest.approx(0, abs=1e-6)
    halves = [0.5 * (desirable if rows[i]["label"] else undesirable) for i in first]
    assert one["kto/loss"] == pytest.approx(sum(halves) / len(halves), abs=1e-6)

    others = kto.mismatched([row["prompt_ids"] for row in rows], 0)
    assert all(rows[i]["prompt"] != rows[others[i]]["prompt"] for i in second)
    pairs = [(rows[i]["prompt_ids"], rows[others[i]]["response_ids"]) for i in second]
    new = summed_logprobs(world.path(f"runs/kto-{desirable}-1/model"), pairs, tokenizer.pad_token_id)
    old = summed_logprobs(reviews.folder("policy"), pairs, tokenizer.pad_token_id)
    drift = (new - old).mean().item()
    assert abs(drift) > 1e-2
    assert (drift > 0) == (desirable > undesirable)
    assert two["kto/reference_point"] == pytest.approx(max(drift, 0.0), abs=1e-5)


def test_auc_by_hand():
    """Of all pairs of one desirable and one undesirable response: ties are not wins."""
    log_ratios = torch.tensor([0.5, 0.1, 0.1, -2.0, 3.0])
    labels = torch.tensor([True, False, True, False, False])
    assert kto.auc(log_ratios, labels) == pytest.approx(3 / 6)
    assert math.isnan(kto.auc(log_ratios, torch.ones(5, dtype=torch.bool)))


def test_mismatched_of_many_rows_of_one_prompt_is_fast():
    """Linear in the rows, also where nearly all of them have the same prompt."""
    prompts = [[1]] * 200_000 + [[2]]
    other = kto.mismatched(prompts, 0)
    assert set(other[:-1]) == {200_000}
    assert other[-1] != 200_000
