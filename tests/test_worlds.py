"""Worlds small enough to enumerate: what TD learning converges to, and what the policy gradients of DVPO and
PPO are, exactly.

Vocabulary {0, 1, 2}, 0 ends a response, three tokens at most: 15 responses of lengths 1, 2, 3, the longest
ones of them cut off without an end. A tabular value or policy holds a number for every prefix, so that each
expectation is a finite sum.
"""

import gc
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from worlds import (
    LIMIT,
    MASK,
    RESPONSES,
    STATES,
    World,
    dynamic_programming,
    exact_gradient,
    kl_of,
    logprobs_of,
    table_of,
)

import dvpo
import gvm_td
import ppo
from assets import reviews
from common import distributed
from common.batches import collate
from common.models import load_model
from common.optimizer import adamw, backward, optimizer_step
from common.tokenization import load_tokenizer
from common.value_heads import response_values

# --- temporal differences -----------------------------------------------------------------------------------


def weighted_td_loss(values, scores, weights, gamma, lam):
    """td_loss with a weight for each response: targets are linear in values and scores, so it is a scale of
    both."""
    scale = weights.sqrt()
    return gvm_td.td_loss(values * scale[:, None], scores * scale, MASK, gamma, lam)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_td_fixed_point_is_the_dynamic_programming_value(lam, gamma):
    """A tabular value trained on td_loss, each response weighted by its probability, becomes E[gamma^(T - t)
    S | prefix]."""
    world = World()
    weights = logprobs_of(world.logits).sum(1).exp()
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)  # the enumeration is complete
    expected = table_of(dynamic_programming(world.logits, world.scores, gamma), gamma)
    prefixes = STATES + RESPONSES
    at = torch.tensor([[prefixes.index(y[: min(t, len(y))]) for t in range(LIMIT + 1)] for y in RESPONSES])
    valid = torch.cat([MASK[:, :1], MASK], 1)
    spread = weights[:, None].expand(-1, LIMIT + 1)[valid]
    visits = torch.zeros(len(prefixes), dtype=torch.float64).index_add_(0, at[valid], spread)
    table = torch.zeros(len(prefixes), dtype=torch.float64, requires_grad=True)
    for _ in range(60):
        values = table[at].masked_fill(~valid, 0.0)
        loss = weighted_td_loss(values, world.scores, weights, gamma, lam)
        (slope,) = torch.autograd.grad(loss, table)
        with torch.no_grad():
            table -= 0.4 * slope / visits  # the loss is quadratic: curvature 2 * visits
    torch.testing.assert_close(table.detach()[at].masked_fill(~valid, 0.0), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def group():
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if mine:
        distributed.mesh.cache_clear()
        gc.collect()  # FSDP's models go before the group does
        dist.destroy_process_group()


def test_a_transformer_gvm_approaches_the_dynamic_programming_value(group, tmp_path):
    """load_model, response_values and td_loss at lam 0.95, responses weighted by their probability: within
    0.1 of values that spread over more than 1, in each of the 29 prefixes."""
    world = World(seed=1)
    tokenizer = load_tokenizer(reviews.folder("untrained"))
    shape = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    backbone = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape)
    torch.manual_seed(0)
    LlamaForCausalLM(backbone).save_pretrained(tmp_path)
    args = SimpleNamespace(precision="fp32", lora_rank=0, shard_size=0, gradient_checkpointing=False)
    model = load_model("value", str(tmp_path), tokenizer, args, trained=True)
    world.logits *= 0.5  # no response so rare that it is not learned in a few seconds
    weights = logprobs_of(world.logits).sum(1).exp().float()
    expected = table_of(dynamic_programming(world.logits, world.scores))
    words = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["soup", "warm"])]
    batch = collate([([1, 6, 7], [words[t] for t in y]) for y in RESPONSES], tokenizer.pad_token_id, "cpu")
    optimizer = adamw(model, 0.0)
    for step in range(150):
        loss = weighted_td_loss(response_values(model, **batch), world.scores.float(), weights, 1.0, 0.95)
        backward(loss)
        optimizer_step(model, optimizer, 3e-3 * (1 - step / 150), loss, 1.0, "")
    error = (response_values(model, **batch).detach() - expected).abs().max().item()
    spread = (expected.max() - expected.min()).item()
    assert spread > 1 and error < 0.1, (spread, error)


# --- policy gradients ---------------------------------------------------------------------------------------


def estimated_gradient(script, world, advantages):
    """The expected gradient of a script's policy_loss at ratio 1, minus sign taken off: the loss is linear in
    A, so that weighting A by the response's probability gives the expectation over responses drawn from the
    policy."""
    logits = world.logits.clone().requires_grad_()
    logprobs = logprobs_of(logits)
    p = logprobs.detach().sum(1).exp()
    loss, _ = script.policy_loss(logprobs, logprobs.detach(), advantages * p[:, None], MASK, 0.2)
    (slope,) = torch.autograd.grad(loss, logits)
    return -slope


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_dvpo_gradient_with_an_exact_gvm_is_the_exact_policy_gradient(lam):
    """E[gradient] = d/dtheta E[S] for every lam, when the GVM is the current policy's dynamic-programming
    value."""
    world = World()
    values = table_of(dynamic_programming(world.logits, world.scores))
    final = values.gather(1, MASK.sum(1, keepdim=True)).squeeze(1)  # Q(s_T, a_T), as dvpo.py reads it
    rewards = dvpo.token_rewards(kl_of(world), final, MASK, 0.0)
    got = estimated_gradient(dvpo, world, dvpo.gae(rewards, values[:, :-1], MASK, 1.0, lam))
    exact = exact_gradient(world, 0.0)
    assert exact.abs().max() > 0.05
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_without_the_score_on_the_last_token_the_gradient_is_wrong(lam):
    """The released trainer's variant, no reward at the end, gives the last token -V: far from the policy
    gradient."""
    world = World()
    values = table_of(dynamic_programming(world.logits, world.scores))
    rewards = dvpo.token_rewards(kl_of(world), torch.zeros(len(RESPONSES), dtype=torch.float64), MASK, 0.0)
    got = estimated_gradient(dvpo, world, dvpo.gae(rewards, values[:, :-1], MASK, 1.0, lam))
    exact = exact_gradient(world, 0.0)
    assert (got - exact).norm() > 0.5 * exact.norm()


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_dvpo_gradient_with_a_kl_penalty_the_gvm_knows_nothing_of(lam):
    """V of the score alone: at lam 1 the gradient of E[S] - beta KL is exact; below, later penalties fade as
    lam^l, no more."""
    world = World()
    beta = 0.7
    values = table_of(dynamic_programming(world.logits, world.scores))
    kl = kl_of(world)
    rewards = dvpo.token_rewards(kl, world.scores, MASK, beta)
    got = estimated_gradient(dvpo, world, dvpo.gae(rewards, values[:, :-1], MASK, 1.0, lam))
    exact = exact_gradient(world, beta)
    fading = sum(lam**k * torch.nn.functional.pad(kl, (0, k))[:, k : k + LIMIT] for k in range(LIMIT))
    expected = exact_gradient(world, 0.0) + estimated_gradient(dvpo, world, -beta * fading)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    distance = (got - exact).abs().max().item()
    assert distance < 1e-12 if lam == 1 else distance > 1e-3


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_dvpo_expected_advantage_with_a_discounted_gvm(lam):
    """gamma < 1: with dvpo.py's V(s_{t+1}) = Q(s_t, a_t) / gamma, E[A_t | s_t, a_t] = Q(s_t, a_t) - V(s_t)
    for all lam."""
    world = World()
    gamma = 0.8
    values = table_of(dynamic_programming(world.logits, world.scores, gamma), gamma)
    old_values = values[:, :-1] / gamma
    old_values[:, 0] = values[:, 0]
    rewards = dvpo.token_rewards(kl_of(world), world.scores, MASK, 0.0)
    advantages = dvpo.gae(rewards, old_values, MASK, gamma, lam)
    p = logprobs_of(world.logits).sum(1).exp()
    for prefix in [y[:t] for y in RESPONSES for t in range(1, len(y) + 1)]:
        at = [i for i, y in enumerate(RESPONSES) if y[: len(prefix)] == prefix]
        t = len(prefix) - 1
        mean = (p[at] * advantages[at, t]).sum() / p[at].sum()
        assert mean.item() == pytest.approx((values[at[0], t + 1] - old_values[at[0], t]).item(), abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_ppo_gradient_with_an_exact_critic_is_the_exact_policy_gradient(lam, beta):
    """PPO's critic learns returns that include the KL: with that V the gradient of E[S] - beta KL is exact
    for every lam."""
    world = World()
    log_ratio = world.logits.log_softmax(-1) - world.ref_logits.log_softmax(-1)
    step = {(s, a): -beta * log_ratio[i, a].item() for i, s in enumerate(STATES) for a in range(3)}
    values = dynamic_programming(world.logits, world.scores, step=step)
    values = table_of(values)[:, :-1]
    rewards = ppo.token_rewards(kl_of(world), world.scores, MASK, beta)
    got = estimated_gradient(ppo, world, ppo.gae(rewards, values, MASK, 1.0, lam))
    torch.testing.assert_close(got, exact_gradient(world, beta), rtol=0, atol=1e-12)


def test_ppo_critic_fixed_point_is_the_dynamic_programming_value():
    """Regression on R = A + V with value_loss, by probability, drives a tabular critic to V for lam < 1
    too."""
    world = World()
    exact = dynamic_programming(world.logits, world.scores)
    at = torch.tensor([[STATES.index(y[: min(t, len(y) - 1)]) for t in range(LIMIT)] for y in RESPONSES])
    p = logprobs_of(world.logits).sum(1).exp()
    visits = torch.zeros(len(STATES), dtype=torch.float64).index_add_(
        0, at[MASK], p[:, None].expand(-1, LIMIT)[MASK]
    )
    table = torch.zeros(len(STATES), dtype=torch.float64, requires_grad=True)
    rewards = ppo.token_rewards(torch.zeros(MASK.shape, dtype=torch.float64), world.scores, MASK, 0.0)
    for _ in range(60):
        old = table.detach()[at]
        returns = ppo.gae(rewards, old, MASK, 1.0, 0.5) + old
        scale = p.sqrt()[:, None]  # a squared error: weights by the scale of its arguments, as above
        loss = ppo.value_loss(table[at] * scale, old * scale, returns * scale, MASK, 1e9)
        (slope,) = torch.autograd.grad(loss, table)
        with torch.no_grad():
            table -= 0.8 * slope / visits
    torch.testing.assert_close(
        table.detach(), torch.tensor([exact[s] for s in STATES], dtype=torch.float64), rtol=0, atol=1e-6
    )
