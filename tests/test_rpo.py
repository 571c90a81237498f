"""rpo.py's functions against loops, identities of the paper, and the closed-form optimum of an enumerable
world."""

import itertools
import math
import random

import helpers
import numpy as np
import pytest
import torch

import rpo
from common.reference import fingerprint


def ragged(seed=0, prompts=7, low=1, high=6):
    """Random (ref_logprobs, rewards, groups) of several responses to each prompt, in mixed order."""
    rng = random.Random(seed)
    rows = []
    for x in range(prompts):
        for _ in range(rng.randint(low, high)):
            ref_logprob = rng.uniform(-40, -5)
            reward = rng.gauss(0, 1)
            rows.append((ref_logprob, reward, x))
    rng.shuffle(rows)
    ref = torch.tensor([ref_logprob for ref_logprob, _, _ in rows])
    rewards = torch.tensor([reward for _, reward, _ in rows])
    groups = torch.tensor([x for _, _, x in rows])
    return ref.double(), rewards.double(), groups


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_partition_value_is_the_sum_over_the_prompts_responses(tau):
    """V(x) against the brute-force sum; one number for each response, the same for all of a prompt."""
    ref, rewards, groups = ragged()
    values = rpo.partition_values(ref, rewards, groups, tau)
    assert values.shape == ref.shape
    for i, group in enumerate(groups.tolist()):
        same = [j for j in range(len(ref)) if groups[j] == group]
        total = sum(math.exp(ref[j].item() + rewards[j].item() / tau) for j in same)
        assert values[i].item() == pytest.approx(tau * math.log(total), abs=1e-9)


def test_targets_of_a_prompt_are_a_distribution():
    """sum_j exp(ref_logprob_j + (r_j - V) / tau) = 1 for every prompt."""
    ref, rewards, groups = ragged(1)
    targets = (rewards - rpo.partition_values(ref, rewards, groups, 0.5)) / 0.5
    mass = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
    mass = mass.scatter_add(0, groups, (ref + targets).exp())
    torch.testing.assert_close(mass, torch.ones_like(mass))


def test_a_single_response_has_a_target_that_ignores_its_reward():
    """Its target is -ref_logprob, log pi = 0, whatever the reward: why such prompts are dropped."""
    ref = torch.tensor([-9.0])
    groups = torch.tensor([0])
    for reward in (-3.0, 5.0):
        rewards = torch.tensor([reward])
        target = (rewards - rpo.partition_values(ref, rewards, groups, 0.7)) / 0.7
        assert target.item() == pytest.approx(9.0, abs=1e-6)


PARTITIONS = ("reference", "sample", "self-normalised", "none")


def brute_force(ref: list[float], rewards: list[float], tau: float) -> dict[str, float]:
    """V of one prompt by each estimate, without logarithms until the end."""
    tilts = [math.exp(reward / tau) for reward in rewards]
    weights = [math.exp(logprob) for logprob in ref]
    weighted = sum(weight * tilt for weight, tilt in zip(weights, tilts, strict=True))
    return {
        "reference": tau * math.log(weighted),
        "sample": tau * math.log(sum(tilts) / len(tilts)),
        "self-normalised": tau * math.log(weighted / sum(weights)),
        "none": 0.0,
    }


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
def test_every_estimate_of_the_partition_value_against_brute_force(tau):
    ref, rewards, groups = ragged(2)
    for x in range(int(groups.max()) + 1):
        rows = [i for i, group in enumerate(groups.tolist()) if group == x]
        expected = brute_force(ref[rows].tolist(), rewards[rows].tolist(), tau)
        for partition in PARTITIONS:
            values = rpo.partition_values(ref, rewards, groups, tau, partition)
            assert values.dtype == torch.float64
            assert values[rows].tolist() == pytest.approx([expected[partition]] * len(rows), abs=1e-9)


def test_equal_rewards_have_their_reward_as_value():
    """Z is exp(c / tau) where every reward is c. The sum weighted with pi_ref is off by the probability that
    the answers at hand have together."""
    ref, _, groups = ragged(3)
    tau = 0.7
    c = 1.3
    rewards = torch.full_like(ref, c)
    mass = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).scatter_add(0, groups, ref.exp())
    for partition in ("sample", "self-normalised"):
        values = rpo.partition_values(ref, rewards, groups, tau, partition)
        torch.testing.assert_close(values, rewards)
    values = rpo.partition_values(ref, rewards, groups, tau, "reference")
    torch.testing.assert_close(values, c + tau * mass.log()[groups])


def test_estimates_from_drawn_and_from_foreign_answers():
    """On a table of 12 answers. Drawn from pi_ref, the mean is tau log Z within its Monte-Carlo error, and the
    sum weighted with pi_ref counts pi_ref twice. With every answer once (drawn from a uniform policy) the sums
    are exact, and the mean is not."""
    generator = torch.Generator().manual_seed(0)
    tau = 0.5
    answers = 12
    ref = (2 * torch.randn(answers, generator=generator, dtype=torch.float64)).log_softmax(0)
    rewards = torch.randn(answers, generator=generator, dtype=torch.float64)
    tilts = (rewards / tau).exp()
    z = (ref.exp() * tilts).sum()
    truth = (tau * z.log()).item()

    count = 20_000
    drawn = torch.multinomial(ref.exp(), count, replacement=True, generator=generator)
    one_prompt = torch.zeros(count, dtype=torch.long)
    found = {}
    for partition in PARTITIONS:
        values = rpo.partition_values(ref[drawn], rewards[drawn], one_prompt, tau, partition)
        found[partition] = values[0].item()
    # of tau log of the mean, by the delta method
    error = tau * (tilts[drawn].std() / tilts[drawn].mean() / math.sqrt(count)).item()
    assert abs(found["sample"] - truth) < 4 * error
    assert 100 * error < abs(found["reference"] - truth)
    assert 10 * error < abs(found["self-normalised"] - truth)  # pi_ref twice too, though of weight 1

    one_prompt = torch.zeros(answers, dtype=torch.long)
    for partition, exact in (("reference", True), ("self-normalised", True), ("sample", False)):
        values = rpo.partition_values(ref, rewards, one_prompt, tau, partition)
        assert (abs(values[0].item() - truth) < 1e-9) == exact, partition


@pytest.mark.parametrize("partition", PARTITIONS)
def test_the_order_of_the_responses_changes_no_value(partition):
    ref, rewards, groups = ragged(4)
    values = rpo.partition_values(ref, rewards, groups, 0.4, partition)
    mixed = torch.randperm(len(ref), generator=torch.Generator().manual_seed(1))
    again = rpo.partition_values(ref[mixed], rewards[mixed], groups[mixed], 0.4, partition)
    torch.testing.assert_close(again, values[mixed])


def test_a_single_response_has_a_log_ratio_of_0_by_the_normalised_estimates():
    """Whatever its reward, as with the paper's sum: such prompts are dropped for all but `none`."""
    ref = torch.tensor([-9.0])
    groups = torch.tensor([0])
    for reward in (-3.0, 5.0):
        rewards = torch.tensor([reward], dtype=torch.float64)
        for partition, target in (("sample", 0.0), ("self-normalised", 0.0), ("none", reward / 0.7)):
            values = rpo.partition_values(ref, rewards, groups, 0.7, partition)
            assert ((rewards - values) / 0.7).item() == pytest.approx(target, abs=1e-12)


def test_no_underflow_of_the_other_estimates():
    """Long responses in float32, and rewards that are large beside tau: exp of none of them would be finite and
    above 0."""
    ref = torch.tensor([-6000.0, -6001.0, -4000.0])
    rewards = torch.tensor([900.0, -900.0, 900.0])
    groups = torch.tensor([0, 0, 1])
    sample = rpo.partition_values(ref, rewards, groups, 1.0, "sample")
    assert sample.tolist() == pytest.approx([900 - math.log(2), 900 - math.log(2), 900])
    normalised = rpo.partition_values(ref, rewards, groups, 1.0, "self-normalised")
    first = 900 - math.log1p(math.exp(-1))
    assert normalised.tolist() == pytest.approx([first, first, 900])


def test_no_underflow_for_long_responses():
    """Summed log-probabilities of 2,000-token responses, in float32: exp of each is 0, V is finite and
    right."""
    ref = torch.tensor([-6000.0, -6001.0, -4000.0])
    rewards = torch.tensor([1.0, -1.0, 0.5])
    groups = torch.tensor([0, 0, 1])
    assert ref.exp().eq(0).all()
    values = rpo.partition_values(ref, rewards, groups, 1.0)
    first = -5999 + math.log1p(math.exp(-3))
    assert values.tolist() == pytest.approx([first, first, -3999.5])


def test_loss_against_a_loop_and_without_broadcasting():
    """Half the summed squares, and a gradient for each response from its own residual alone."""
    generator = torch.Generator().manual_seed(0)
    logprobs, ref, targets = torch.randn(3, 6, generator=generator, dtype=torch.float64).unbind(0)
    logprobs.requires_grad_()
    loss = rpo.rpo_loss(logprobs, ref, targets)
    residuals = [logprobs[i].item() - ref[i].item() - targets[i].item() for i in range(len(ref))]
    assert loss.item() == pytest.approx(0.5 * sum(residual**2 for residual in residuals))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == pytest.approx(residuals)


def test_reaches_the_closed_form_optimum_of_an_enumerable_world():
    """With every response listed, training ends at pi_ref exp(r / tau) / Z: total variation below 0.02 for
    every prompt.

    The policy is autoregressive: a table of next-token logits for each prompt and prefix over two words and
    the end.
    """
    texts = []
    for length in range(3):
        for words in itertools.product((0, 1), repeat=length):
            texts.append(words + (2,))
    texts += list(itertools.product((0, 1), repeat=3))  # cut off at 3
    every_prefix = {y[:t] for y in texts for t in range(len(y))}
    prefixes = {prefix: i for i, prefix in enumerate(sorted(every_prefix))}
    rng = torch.Generator().manual_seed(3)
    prompts = 4
    tau = 0.5
    ref_logits = torch.randn(prompts, len(prefixes), 3, generator=rng, dtype=torch.float64)
    rewards = torch.randn(prompts * len(texts), generator=rng, dtype=torch.float64)
    groups = torch.arange(prompts).repeat_interleave(len(texts))

    def logprobs(logits):
        """log pi(y|x) of every response to every prompt, one prompt after the other."""
        table = logits.log_softmax(-1)
        sums = []
        for x in range(prompts):
            for y in texts:
                sums.append(sum(table[x, prefixes[y[:t]], y[t]] for t in range(len(y))))
        return torch.stack(sums)

    ref = logprobs(ref_logits)
    mass = ref.view(prompts, -1).exp().sum(1)
    assert mass.tolist() == pytest.approx([1.0] * prompts)  # these are all responses there are
    targets = (rewards - rpo.partition_values(ref, rewards, groups, tau)) / tau
    optimum = (ref + rewards / tau).view(prompts, -1).softmax(1)
    logits = ref_logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)

    def distance():
        """Total variation between the policy and the optimum, for each prompt."""
        policy = logprobs(logits.detach()).view(prompts, -1).exp()
        return 0.5 * (policy - optimum).abs().sum(1)

    assert distance().min() > 0.1
    for _ in range(400):
        optimizer.zero_grad()
        loss = rpo.rpo_loss(logprobs(logits), ref, targets) / len(ref)
        loss.backward()
        optimizer.step()
    assert distance().max() < 0.02


def test_implied_accuracy_by_hand():
    """Pairs of one prompt with different rewards; a tie of log-ratios is not a win; other prompts do not
    count."""
    log_ratios = torch.tensor([0.3, 0.1, 0.1, 5.0, -5.0])
    rewards = torch.tensor([2.0, 1.0, 0.0, -9.0, -9.0])
    groups = torch.tensor([0, 0, 0, 1, 1])
    assert rpo.implied_accuracy(log_ratios, rewards, groups) == pytest.approx(2 / 3)
    mixed = torch.tensor([3, 0, 4, 2, 1])
    assert rpo.implied_accuracy(log_ratios[mixed], rewards[mixed], groups[mixed]) == pytest.approx(2 / 3)


def test_distinct_2_by_hand():
    assert rpo.distinct_2(["a b a b", "a b"]) == pytest.approx((2 / 3 + 1) / 2)
    assert rpo.distinct_2(["a", ""]) == 0
    assert rpo.distinct_2(["a b c"] * 100) == 1, "it falls with the number of texts"


def test_thin_keeps_a_share_of_every_prompt():
    rows = [{"prompt": f"p{i % 3}", "n": i} for i in range(24)]
    kept = rpo.thin(rows, 0.25, 0)
    for prompt in ("p0", "p1", "p2"):
        assert sum(row["prompt"] == prompt for row in kept) == 2
    order = [row["n"] for row in kept]
    assert order == sorted(order)
    assert kept != rpo.thin(rows, 0.25, 1)
    assert rpo.thin(rows, 1.0, 0) == rows
    assert len(rpo.thin(rows, 0.01, 0)) == 3


def test_groups_number_the_prompts_as_they_appear():
    """Prompts may be chat messages; two rows of one prompt need not follow each other."""
    chat = [{"role": "user", "content": "q"}]
    rows = [{"prompt": prompt} for prompt in ("b", chat, "a", "b", chat)]
    assert rpo.prompt_groups(rows).tolist() == [0, 1, 2, 0, 1]


def test_one_row_per_prompt_is_its_last():
    rows = [{"prompt": prompt, "n": n} for n, prompt in enumerate(("b", "a", "b", "c"))]
    assert [row["n"] for row in rpo.one_row_per_prompt(rows)] == [2, 1, 3]


def test_kept_reference_is_used_on_resume_unless_it_is_of_something_else(world):
    """With its key the file's numbers are taken (here moved by 100 nats, which moves the targets); with
    another they are not."""
    args = helpers.ARGS["rpo"] | dict(
        precompute_ref=True, save_every=1, steps=1, tau=1.0, lr_schedule="constant"
    )
    for key, moved in ((None, True), ("of something else", False)):
        run_dir = f"runs/kept-{moved}"
        world.run("rpo", **args, run_dir=run_dir).ok()
        cache = world.path(run_dir) / "reference.npz"
        found = dict(np.load(cache))
        found["train"] = found["train"] + 100.0
        if key:
            found["key"] = key
        np.savez(cache, **found)
        world.run("rpo", **args | dict(steps=2), run_dir=run_dir, resume=True).ok()
        logged = helpers.metrics(world.path(run_dir))
        first, second = (row["rpo/target"] for row in logged if "rpo/target" in row)
        assert (abs(second - first) > 50) == moved


@pytest.mark.parametrize("partition", PARTITIONS)
def test_prompts_with_a_single_response_are_kept_by_none_alone(world, partition):
    rows = []
    for i, prompt in enumerate(("soup", "soup", "soup", "fish", "fish", "cake")):
        rows.append({"prompt": f"lunch : the {prompt} ?", "response": "very warm .", "reward": float(i)})
    args = helpers.ARGS["rpo"] | dict(
        dataset=world.write("few.jsonl", rows),
        eval_dataset="scored.jsonl",
        eval_split="train",
        steps=1,
        eval_prompts=0,
        partition=partition,
    )
    result = world.run("rpo", **args, run_dir=f"runs/few-{partition}").ok()
    dropped = "few.jsonl: dropped 1 of 3 prompts with a single response" in result.output
    kept = "6 responses to 3 prompts" in result.output
    assert (dropped, kept) == (partition != "none", partition == "none")


def test_responses_of_2000_tokens_in_bf16(world):
    """Nothing underflows: sums far below -104 give finite targets of their own size, and a step is made.
    Prompts with a single response are dropped and counted."""
    rng = random.Random(0)
    rows = []
    for topic, responses in (("soup", 3), ("fish", 3), ("cake", 3), ("rice", 1)):
        for _ in range(responses):
            text = " ".join(rng.choice(["very", "warm", "soup", "and", "."]) for _ in range(2000))
            rows.append({"prompt": f"lunch : the {topic} ?", "response": text, "reward": rng.gauss(0, 1)})
    longer = helpers.edit_model(
        world, "policy", "longer", config=lambda old: old | dict(max_position_embeddings=4096)
    )
    args = helpers.ARGS["rpo"] | dict(
        model=longer,
        dataset=world.write("endless.jsonl", rows),
        eval_dataset="scored.jsonl",
        eval_split="train",
        precision="bf16",
        batch_size=2,
        micro_batch_size=1,
        max_response_length=2048,
        steps=1,
        eval_prompts=0,
    )
    result = world.run("rpo", **args, run_dir="runs/endless").ok()
    assert "endless.jsonl: dropped 1 of 4 prompts with a single response" in result.output
    sums = np.load(world.path("runs/endless") / "reference.npz")["train"]
    logged = helpers.metrics(world.path("runs/endless"))
    (row,) = (row for row in logged if "rpo/target" in row)
    assert sums.dtype == np.float64
    assert len(sums) == 9
    assert sums.max() < -2000
    assert 1000 < row["rpo/target"] < -sums.min() + 100
    assert math.isfinite(row["rpo/grad_norm"])
    assert row["rpo/grad_norm"] > 0


def test_fingerprint_is_of_the_weights(tmp_path):
    """Another model of the same name, or the same with one weight changed, has another one."""
    from safetensors.torch import save_file

    found = set()
    for value in (0.0, 1.0, 1.0):
        save_file({"w": torch.full((2,), value)}, tmp_path / "model.safetensors")
        found.add(fingerprint(str(tmp_path)))
    assert len(found) == 2
