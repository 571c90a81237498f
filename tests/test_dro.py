"""dro.py's functions against loops, plain forwards and the closed-form optimum of an enumerable world; its
first step by hand."""

import helpers
import pytest
import torch
from transformers import LlamaConfig, LlamaForTokenClassification
from worlds import World, logprobs_of

import dro
from common.batches import collate


def columns(n=6, seed=0):
    """Random (logprobs, ref_logprobs, rewards, values), each [n]."""
    return torch.randn(4, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind(0)


def test_losses_against_a_loop_and_without_broadcasting():
    """Both are half the summed squares of delta = r - V - tau * log-ratio: the same number, one residual per
    response."""
    for tau in (0.3, 2.0):
        logprobs, ref, rewards, values = columns()
        expected = 0.0
        for i in range(len(rewards)):
            delta = rewards[i].item() - values[i].item() - tau * (logprobs[i].item() - ref[i].item())
            expected += 0.5 * delta**2
        policy, value = dro.dro_losses(logprobs, ref, rewards, values, tau)
        assert policy.shape == value.shape == ()
        assert policy.item() == pytest.approx(expected, abs=1e-12)
        assert value.item() == pytest.approx(policy.item(), abs=1e-12)


def test_gradients_do_not_cross():
    """The policy's loss moves log pi alone, by -tau * delta, and V's moves V alone, by -delta; so does their
    sum, which is what the script sends backward."""
    tau = 0.3
    logprobs, ref, rewards, values = columns()
    logprobs.requires_grad_()
    values.requires_grad_()
    delta = (rewards - values - tau * (logprobs - ref)).detach()
    policy, value = dro.dro_losses(logprobs, ref, rewards, values, tau)
    of_policy = torch.autograd.grad(policy, (logprobs, values), retain_graph=True, allow_unused=True)
    of_value = torch.autograd.grad(value, (logprobs, values), retain_graph=True, allow_unused=True)
    assert of_policy[1] is None and of_value[0] is None
    torch.testing.assert_close(of_policy[0], -tau * delta)
    torch.testing.assert_close(of_value[1], -delta)
    both = torch.autograd.grad(policy + value, (logprobs, values))
    torch.testing.assert_close(both, (of_policy[0], of_value[1]))


# --- V(x) ---------------------------------------------------------------------------------------------------

SEQUENCES = [([5, 6, 7], [8, 9]), ([4], [5, 6, 7, 8]), ([9, 8, 7, 6, 5], [4])]


def test_value_is_of_the_last_prompt_token():
    """A ragged batch against a decoder's last output on one unpadded prompt at a time; neither the padding
    nor the response is read. (An encoder's mean over the prompt: test_t5.py.)"""
    torch.manual_seed(0)
    shape = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    config = LlamaConfig(vocab_size=12, num_labels=1, pad_token_id=0, **shape)
    model = LlamaForTokenClassification(config).eval()
    with torch.no_grad():
        expected = []
        for prompt, _ in SEQUENCES:
            outputs = model(input_ids=torch.tensor([prompt])).logits
            expected.append(outputs[0, -1, 0])
        expected = torch.stack(expected)
        assert expected.std() > 0.1
        for pad in (0, 3):
            values = dro.prompt_values(model, **collate(SEQUENCES, pad, "cpu"))
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
        others = [(prompt, [11 - token for token in response]) for prompt, response in SEQUENCES]
        values = dro.prompt_values(model, **collate(others, 0, "cpu"))
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)


# --- optimum ------------------------------------------------------------------------------------------------


def test_reaches_the_closed_form_optimum_of_an_enumerable_world():
    """With every response listed, one V per prompt and two optimizers as in the script: the policy ends at
    pi_ref exp(r / tau) / Z, total variation below 0.02 for every prompt, and V at tau log Z."""
    worlds = [World(seed) for seed in range(3)]
    tau = 0.5
    count = len(worlds[0].scores)
    rewards = torch.cat([world.scores for world in worlds])

    def logprobs_all(tables):
        """log pi(y|x) of every response to every prompt, one prompt after the other."""
        return torch.cat([logprobs_of(table).sum(1) for table in tables])

    ref = logprobs_all([world.ref_logits for world in worlds])
    assert ref.view(-1, count).exp().sum(1).tolist() == pytest.approx([1.0] * 3)  # all responses are there
    tilted = (ref + rewards / tau).view(-1, count)
    optimum = tilted.softmax(1)
    partition = tau * tilted.logsumexp(1)
    logits = torch.stack([world.ref_logits for world in worlds]).requires_grad_()
    values = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizers = [torch.optim.Adam([logits], lr=0.05), torch.optim.Adam([values], lr=0.05)]

    def distance():
        """Total variation between the policy and the optimum, for each prompt."""
        policy = logprobs_all(logits.detach()).view(-1, count).exp()
        return 0.5 * (policy - optimum).abs().sum(1)

    assert distance().min() > 0.1
    assert (values.detach() - partition).abs().min() > 0.1
    for _ in range(400):
        repeated = values.repeat_interleave(count)
        policy_loss, value_loss = dro.dro_losses(logprobs_all(logits), ref, rewards, repeated, tau)
        loss = (policy_loss + value_loss) / len(ref)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert distance().max() < 0.02
    assert (values.detach() - partition).abs().max() < 0.02


# --- the script ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [True, False])
def test_first_step_by_hand(world, rescale):
    """Where the policy is the reference and V is 0, the loss over all of the data is half the mean square of
    the standardised rewards, (N - 1) / 2N; the policy's learning rate is lr / tau, or lr without the paper's
    rescale."""
    rows = len(world.path("scored.jsonl").read_text().splitlines())
    args = helpers.ARGS["dro"] | dict(
        eval_dataset="scored.jsonl", eval_split="train", batch_size=rows, micro_batch_size=32
    )
    args |= dict(steps=1, tau=0.25, lr=1e-3, lr_schedule="constant", rescale_lr=rescale, precision="fp64")
    run_dir = f"runs/dro-first-{rescale}"
    world.run("dro", **args, run_dir=run_dir).ok()
    (row,) = (row for row in helpers.metrics(world.path(run_dir)) if "dro/loss" in row)
    assert row["dro/loss"] == pytest.approx(0.5 * (rows - 1) / rows, abs=1e-6)
    assert row["dro/log_ratio"] == pytest.approx(0, abs=1e-6)
    assert row["dro/value"] == pytest.approx(0, abs=1e-6)
    assert row["dro/lr"] == pytest.approx(4e-3 if rescale else 1e-3)
    assert row["dro/grad_norm"] > 0
    assert row["dro/value_grad_norm"] > 0
