"""The scripts' pure functions against closed forms, enumerations and loops from the equations; the equality
of their copies."""

import ast
import math
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

import dvpo
import gvm_td
import ppo
import reward
from common import measures

ROOT = Path(ppo.__file__).parent
SCRIPTS = sorted(ROOT.glob("*.py"))
NAN = float("nan")
INF = float("inf")


def ragged(lengths, width=None):
    return torch.arange(width or max(lengths))[None] < torch.tensor(lengths)[:, None]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- returns and advantages ---------------------------------------------------------------------------------


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


def test_whiten_reads_only_the_valid_entries():
    """Mean 0 (kept with centre=False) and standard deviation 1 over valid tokens; padding, even NaN, is not
    read."""
    mask = ragged([1, 3, 5])
    x = 3 + 7 * noise(3, 5)
    clean = ppo.whiten(x, mask)
    expected = (x[mask] - np.mean(x[mask].numpy())) / np.std(x[mask].numpy())
    torch.testing.assert_close(clean[mask], expected, rtol=0, atol=1e-7)
    assert (clean[~mask] == 0).all()
    scaled = ppo.whiten(x, mask, centre=False)
    torch.testing.assert_close(scaled[mask], x[mask] / np.std(x[mask].numpy()), rtol=0, atol=1e-7)
    assert (scaled[~mask] == 0).all()
    for rubbish in (NAN, INF, 1e9):
        torch.testing.assert_close(ppo.whiten(x.masked_fill(~mask, rubbish), mask), clean, rtol=0, atol=0)
    assert torch.isfinite(
        ppo.whiten(torch.ones(2, 3), ragged([1, 3]))
    ).all()  # no spread is not a division by zero


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


# --- KL -----------------------------------------------------------------------------------------------------


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


# --- losses -------------------------------------------------------------------------------------------------


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


def test_bradley_terry_loss_closed_form_and_stable():
    """-log sigmoid(d) = log(1 + exp(-d)), summed; differences of +-1e4 neither overflow nor lose their
    gradient."""
    d = torch.tensor([0.0, 1.5, -2.0], dtype=torch.float64)
    expected = sum(math.log(1 + math.exp(-x)) for x in d.tolist())
    assert reward.bradley_terry_loss(d + 3, torch.full_like(d, 3.0)).item() == pytest.approx(
        expected, abs=1e-12
    )
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = reward.bradley_terry_loss(chosen, torch.zeros(2))
    loss.backward()
    assert loss.item() == 1e4 and chosen.grad.tolist() == [0.0, -1.0]


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


# --- accuracy of a value model ------------------------------------------------------------------------------


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


# --- schedule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_schedules(schedule):
    """Warm-up reaches the peak at its last step, never 0; then constant, or a line or a half cosine to 0 at
    `steps`."""
    rate = [ppo.learning_rate(s, 24, 2.0, 4, schedule) for s in range(25)]
    assert rate[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    for s in range(4, 25):
        x = (s - 4) / 20
        assert rate[s] == pytest.approx(
            {"constant": 2.0, "linear": 2 * (1 - x), "cosine": 1 + math.cos(math.pi * x)}[schedule]
        )
    assert ppo.learning_rate(0, 10, 2.0, 0, schedule) == pytest.approx(2.0)  # no warm-up starts at the peak


# --- the sources --------------------------------------------------------------------------------------------


def functions(path, nested=False):
    """Name -> exact source of the module-level functions of a file, decorators included; with `nested`, of
    all."""
    text = path.read_text()
    tree = ast.parse(text)
    found = {}
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno] + [d.lineno for d in node.decorator_list])
            found[node.name] = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return found


def copies_of(paths, nested=False):
    """Name -> {file: source} of the functions, but for `main`, that two or more files hold."""
    where = {}
    for path in paths:
        for name, text in functions(path, nested).items():
            where.setdefault(name, {})[path.name] = text
    del where["main"]
    return {name: copies for name, copies in where.items() if len(copies) > 1}


def different_ones(copies):
    return {name: sorted(where) for name, where in copies.items() if len(set(where.values())) > 1}


def test_copies_of_a_function_are_identical_byte_for_byte():
    """A function that two scripts hold (but `main`) is the same text in both, so that a fix reaches every
    copy."""
    copies = copies_of(SCRIPTS)
    assert {"gae", "whiten", "token_rewards", "kl_estimates", "policy_loss", "next_beta"} <= set(copies)
    assert not different_ones(copies)


def test_copies_inside_the_mains_of_the_online_scripts_are_identical_too():
    """What must differ between two of them has two names."""
    copies = copies_of([ROOT / f"{script}.py" for script in helpers.ONLINE], nested=True)
    assert {"logprobs_of", "micro_batch_logprobs", "evaluate", "evaluate_kl_optional"} <= set(copies)
    assert not different_ones(copies)


def test_scripts_do_not_import_scripts_nor_common_a_script():
    """A script stands alone: it imports `common` and libraries; `common` never imports a script."""
    names = {path.stem for path in SCRIPTS}
    assert {"ppo", "dvpo"} <= names
    for path in SCRIPTS + sorted((ROOT / "common").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {m.partition(".")[0] for m in modules} & names, path
