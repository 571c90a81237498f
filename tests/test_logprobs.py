"""Log-probabilities and entropies of responses, against plain transformers on one sequence at a time."""

import math
from types import SimpleNamespace

import pytest
import torch
from random_models import ARGS, BOS, PAD, expected_logprobs, plain, sample_sequences

from common.batches import collate, run_micro_batches
from common.logprobs import OutputForm, TokenLogprobs, token_logprobs
from common.models import load_model
from common.optimizer import backward
from common.rollout import rollout

pytestmark = pytest.mark.usefixtures("group")


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
@pytest.mark.parametrize(
    "temperature, forbidden, bias, form",
    [
        (1.0, None, False, OutputForm()),
        (0.7, None, True, OutputForm()),
        (1.3, [4], False, OutputForm()),
        (1.3, [2, 4], True, OutputForm(scale=0.3)),
        (0.7, [4], True, OutputForm(hidden_scale=0.4, scale=1.7, cap=2.5)),
    ],
)
def test_token_logprobs_is_a_full_log_softmax(chunk, temperature, forbidden, bias, form):
    """Chunked values, entropies and gradients (hidden, weight, bias) equal those of one log_softmax over [N,
    vocab]."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    leaves = [make(12, 8), make(9, 8), make(9) if bias else None]
    tokens = torch.tensor([0, 1, 5, 3, 5, 6, 7, 8, 0, 1, 8, 3])
    left_out = None if forbidden is None else torch.tensor(forbidden)
    slope = make(12)
    results = []
    for full in (True, False):
        h, w, b = (x.clone().requires_grad_() if x is not None else None for x in leaves)
        if full:
            logits = form.scale * (form.hidden_scale * h @ w.T + (b if bias else 0))
            if form.cap:
                logits = form.cap * torch.tanh(logits / form.cap)
            logits = logits / temperature
            if forbidden is not None:
                logits = logits.index_fill(1, left_out, -math.inf)
            table = logits.log_softmax(-1)
            logprobs = table[range(12), tokens]
            entropy = -(table.exp() * table).nan_to_num(0.0).sum(-1)
        else:
            logprobs, entropy = token_logprobs(h, w, b, tokens, temperature, left_out, form, chunk)
        (logprobs * slope).sum().backward()
        results.append([logprobs.detach(), entropy.detach(), h.grad, w.grad] + ([b.grad] if bias else []))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_the_last_chunks_logits_are_made_once_and_a_second_backward_is_as_the_first(monkeypatch):
    """Backward overwrites what forward left of the last chunk; where it is gone, the logits are made
    again."""
    calls = []
    logits = TokenLogprobs.logits
    monkeypatch.setattr(
        TokenLogprobs, "logits", lambda hidden, *rest: calls.append(len(hidden)) or logits(hidden, *rest)
    )
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, generator=generator).requires_grad_() for shape in ((12, 8), (9, 8))
    )
    logprobs, _ = token_logprobs(hidden, weight, None, torch.arange(12) % 9, chunk=5)
    gradients = [torch.autograd.grad(logprobs.sum(), (hidden, weight), retain_graph=True) for _ in range(2)]
    assert calls == [5, 5, 2] + [5, 5] + [2, 5, 5]
    torch.testing.assert_close(*gradients)


def test_the_weights_gradient_in_bfloat16_is_rounded_once():
    """Summed over 64 chunks it is as near the exact one as its own last digit: in bfloat16 the sum would lose
    another digit."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2048, 16, generator=generator).bfloat16()
    weight = (torch.randn(50, 16, generator=generator) * 0.3).bfloat16()
    tokens = torch.randint(50, (2048,), generator=generator)
    gradients = {}
    for dtype in (torch.bfloat16, torch.float64):
        w = weight.to(dtype).clone().requires_grad_()
        logprobs, _ = token_logprobs(hidden.to(dtype), w, None, tokens, chunk=32)
        logprobs.sum().backward()
        gradients[dtype] = w.grad.double()
    exact = gradients[torch.float64]
    assert (gradients[torch.bfloat16] - exact).norm() < 2e-3 * exact.norm()


def test_a_forbidden_token_has_probability_zero():
    """Its log-probability is below any sum's reach and it takes nothing from the others; no NaN in the
    gradient."""
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.zeros(5, 4)
    logprobs, entropy = token_logprobs(
        hidden, weight, None, torch.tensor([0, 1, 2]), forbidden=torch.tensor([2])
    )
    assert logprobs[:2].tolist() == pytest.approx([-math.log(4)] * 2) and logprobs[2] < -1e30
    assert entropy.tolist() == pytest.approx([math.log(4)] * 3)  # uniform over four: the closed form
    logprobs[:2].sum().backward()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_logprobs_of_a_ragged_batch_is_one_sequence_at_a_time(folders, policy, temperature):
    """Padded batch = plain logits of each sequence alone; more padding on the right changes nothing; zero
    where masked."""
    reference = plain(folders, "policy")
    sequences = sample_sequences()
    batch = collate(sequences, PAD, "cpu")
    with torch.no_grad():
        logprobs, entropy = policy.response_logprobs(**batch, temperature=temperature)
        wider = collate(sequences + [([BOS] * 9, [BOS] * 14)], PAD, "cpu")
        wide = policy.response_logprobs(**wider, temperature=temperature)[0]
    for i, (prompt, response) in enumerate(sequences):
        expected = expected_logprobs(reference, prompt, response, temperature)
        n = len(response)
        torch.testing.assert_close(logprobs[i, :n], expected[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(entropy[i, :n], expected[1], rtol=0, atol=2e-5)
        torch.testing.assert_close(wide[i, :n], logprobs[i, :n], rtol=0, atol=2e-5)
        assert (logprobs[i, n:] == 0).all() and (entropy[i, n:] == 0).all()


def test_ratio_is_one_and_kl_zero_before_the_first_update(folders, tokenizer, policy):
    """Sampled responses have the same log-probability, to 1e-5, under policy and reference, however they are
    batched, and in the update's forward (train mode, with dropout in the folder's config)."""
    reference = load_model("policy", folders["policy"], tokenizer, ARGS, trained=False)
    prompts = [p for p, _ in sample_sequences(seed=2)] * 3
    responses = rollout(policy, tokenizer, prompts, 25, 0.8, (0, 1))[0]
    sequences = list(zip(prompts, responses, strict=True))
    score = lambda model, size: run_micro_batches(
        lambda mb: model.response_logprobs(**mb, temperature=0.8)[0],
        sequences,
        size,
        PAD,
        max(map(len, responses)),
    )
    old = score(policy, 5)
    assert policy.training and len(set(map(len, responses))) > 3
    torch.testing.assert_close(score(reference, 2), old, rtol=0, atol=1e-5)
    for i, pair in enumerate(sequences):
        new, _ = policy.response_logprobs(**collate([pair], PAD, "cpu"), temperature=0.8)
        torch.testing.assert_close(new.detach()[0].exp(), old[i, : len(pair[1])].exp(), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_plain_transformers(folders, tokenizer, checkpointing):
    """Backward through the sharded model, with and without gradient checkpointing, gives the unwrapped
    model's gradients."""
    sequences = sample_sequences(seed=3)
    args = SimpleNamespace(**{**vars(ARGS), "gradient_checkpointing": checkpointing})
    model = load_model("policy", folders["policy"], tokenizer, args, trained=True)
    assert model.is_gradient_checkpointing == checkpointing
    backward(model.response_logprobs(**collate(sequences, PAD, "cpu"))[0].sum())
    reference = plain(folders, "policy")
    for prompt, response in sequences:
        logits = reference(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logits = logits.index_fill(1, torch.tensor([PAD]), -math.inf)
        logits.log_softmax(-1)[range(len(response)), response].sum().backward()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_the_pad_token_has_no_probability(folders, policy):
    """Where pad is not eos it is out of the normaliser: its log-probability is -inf in all but name."""
    batch = collate([([BOS, 7, 8], [9, PAD, 10])], PAD, "cpu")
    logprobs, _ = policy.response_logprobs(**batch)
    assert logprobs[0, 1] < -1e30 and (logprobs[0, [0, 2]] > -100).all()
