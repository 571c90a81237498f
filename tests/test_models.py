"""Log-probabilities, values, rewards, rollout and export, against plain transformers on one sequence at a time."""

import copy
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from assets import reviews
from common import rollout as rollout_room
from common.batches import collate, run_micro_batches
from common.checkpoints import export
from common.logprobs import TokenLogprobs, token_logprobs
from common.models import load_model
from common.optimizer import adamw, backward, optimizer_step
from common.rewards import Reward
from common.rollout import decode, rollout, sample
from common.tokenization import encode_prompt, load_tokenizer, stop_token, tokenize
from common.value_heads import response_values, sequence_scores

PAD, BOS, EOS = (reviews.SPECIAL.index(f"<{role}>") for role in ("pad", "bos", "eos"))
ARGS = SimpleNamespace(
    precision="fp32", shard_size=0, gradient_checkpointing=False, micro_batch_size=3, lora_rank=0
)
KINDS = {
    "policy": AutoModelForCausalLM,
    "value": AutoModelForTokenClassification,
    "reward": AutoModelForSequenceClassification,
}
pytestmark = pytest.mark.usefixtures("group")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random policy, value and reward folders with weights so large that no distribution is uniform; dropout in the config."""
    root, found = tmp_path_factory.mktemp("models"), {}
    shape = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    for seed, (kind, auto) in enumerate(KINDS.items()):
        config = LlamaConfig(
            vocab_size=len(reviews.WORDS),
            attention_dropout=0.3,
            num_labels=1,
            classifier_dropout=0.3,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            **shape,
        )
        torch.manual_seed(seed)
        model = auto.from_config(config)
        if kind == "policy":  # the pad token would be a popular one, were it not forbidden
            with torch.no_grad():
                model.lm_head.weight[PAD] = 2 * model.lm_head.weight[10]
        else:
            torch.nn.init.normal_(model.score.weight)
        if kind == "value":
            torch.nn.init.constant_(model.score.bias, 0.7)
        found[kind] = str(root / kind)
        model.save_pretrained(found[kind])
        load_tokenizer(reviews.folder("untrained")).save_pretrained(found[kind])
    return found


@pytest.fixture(scope="module")
def tokenizer(folders):
    return load_tokenizer(folders["policy"])


@pytest.fixture(scope="module")
def policy(folders, tokenizer):
    return load_model("policy", folders["policy"], tokenizer, ARGS, trained=True)


def plain(folders, kind):
    return KINDS[kind].from_pretrained(folders[kind]).eval()


def sample_sequences(seed=0, sizes=((3, 1), (7, 9), (1, 4), (5, 6), (7, 2))):
    """Ragged (prompt, response) pairs of random words; no pad among the response tokens."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, len(reviews.WORDS), (n,), generator=generator).tolist()
    return [(draw(p), draw(r)) for p, r in sizes]


def expected_logprobs(model, prompt, response, temperature=1.0):
    """One sequence through plain transformers: log-probability of each response token and entropy before it, pad excluded."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double() / temperature
    logits[:, PAD] = -math.inf
    table = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    picked = torch.stack([row[token] for row, token in zip(table, response, strict=True)])
    return picked.float(), -(table.exp() * table).nan_to_num(0.0).sum(-1).float()


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
@pytest.mark.parametrize(
    "temperature, forbidden, bias", [(1.0, None, False), (0.7, None, True), (1.3, 4, False)]
)
def test_token_logprobs_is_a_full_log_softmax(chunk, temperature, forbidden, bias):
    """Chunked values, entropies and gradients (hidden, weight, bias) equal those of one log_softmax over [N, vocab]."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    leaves = [make(12, 8), make(9, 8), make(9) if bias else None]
    tokens, slope = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 0, 1, 2, 3]), make(12)
    results = []
    for full in (True, False):
        h, w, b = (x.clone().requires_grad_() if x is not None else None for x in leaves)
        if full:
            logits = (h @ w.T + (b if bias else 0)) / temperature
            if forbidden is not None:
                logits = logits.index_fill(1, torch.tensor([forbidden]), -math.inf)
            table = logits.log_softmax(-1)
            logprobs, entropy = table[range(12), tokens], -(table.exp() * table).nan_to_num(0.0).sum(-1)
        else:
            logprobs, entropy = token_logprobs(h, w, b, tokens, temperature, forbidden, chunk)
        (logprobs * slope).sum().backward()
        results.append([logprobs.detach(), entropy.detach(), h.grad, w.grad] + ([b.grad] if bias else []))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_the_last_chunks_logits_are_made_once_and_a_second_backward_is_as_the_first(monkeypatch):
    """Backward overwrites what forward left of the last chunk; where it is gone, the logits are made again."""
    calls, logits = [], TokenLogprobs.logits
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


def test_a_forbidden_token_has_probability_zero():
    """Its log-probability is below any sum's reach and it takes nothing from the others; no NaN in the gradient."""
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.zeros(5, 4)
    logprobs, entropy = token_logprobs(hidden, weight, None, torch.tensor([0, 1, 2]), 1.0, 2)
    assert logprobs[:2].tolist() == pytest.approx([-math.log(4)] * 2) and logprobs[2] < -1e30
    assert entropy.tolist() == pytest.approx([math.log(4)] * 3)  # uniform over four: the closed form
    logprobs[:2].sum().backward()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_logprobs_of_a_ragged_batch_is_one_sequence_at_a_time(folders, policy, temperature):
    """Padded batch = plain logits of each sequence alone; more padding on the right changes nothing; zero where masked."""
    reference, sequences = plain(folders, "policy"), sample_sequences()
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
    """Sampled responses have the same log-probability, to 1e-5, under policy and reference, however they are batched, and in
    the update's forward (train mode, with dropout in the folder's config)."""
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
    """Backward through the sharded model, with and without gradient checkpointing, gives the unwrapped model's gradients."""
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


# --- values ----------------------------------------------------------------------------------------------------------


def test_response_values_alignment(folders, tokenizer):
    """Column 0 is the output at the last prompt token, column t that at y_t; zero where masked; padding changes nothing."""
    reference, sequences = plain(folders, "value"), sample_sequences()
    model = load_model("value", folders["value"], tokenizer, ARGS, trained=False)
    width = max(len(r) for _, r in sequences) + 1
    values = run_micro_batches(lambda mb: response_values(model, **mb), sequences, 2, PAD, width)
    for i, (prompt, response) in enumerate(sequences):
        with torch.no_grad():
            outputs = reference(input_ids=torch.tensor([prompt + response])).logits[0, :, 0]
        torch.testing.assert_close(values[i, 0], outputs[len(prompt) - 1], rtol=0, atol=2e-5)
        for t in range(1, len(response) + 1):
            torch.testing.assert_close(values[i, t], outputs[len(prompt) + t - 1], rtol=0, atol=2e-5)
        assert (values[i, len(response) + 1 :] == 0).all()
    batch = collate(
        [], PAD, "cpu"
    )  # a rank with nothing to do: one masked sequence, all zero in spite of the head's bias
    assert (response_values(model, **batch) == 0).all()


def test_a_value_model_from_a_policy_starts_at_zero(folders, tokenizer):
    """A head that the folder has not is zero, so that the first values are 0 everywhere, and it is trained."""
    model = load_model("value", folders["policy"], tokenizer, ARGS, trained=True)
    values = response_values(model, **collate(sample_sequences(), PAD, "cpu"))
    assert (values == 0).all()
    backward(((values - 1) ** 2).sum())
    assert model.score.weight.grad.abs().max() > 0


# --- rollout ---------------------------------------------------------------------------------------------------------


def test_inverse_cdf_over_a_grid_of_uniforms_has_the_softmax_frequencies():
    """Exact: over N evenly spaced numbers each token is drawn N p times, to one; a forbidden token never, u = 0 included."""
    n, scores, forbidden = 100_000, torch.tensor([3.0, 1.0, 0.5, -0.7, 1.7, 9.0]), (0, 5)
    for token in forbidden:
        keep = [i for i in range(6) if i != token]
        for temperature in (0.7, 1.0):
            heat = torch.full((n,), temperature)
            out, logprobs = sample(scores.repeat(n, 1), torch.arange(n).double() / n, heat, token)
            counts = out.bincount(minlength=6)
            expected = n * (scores[keep].double() / heat[0]).softmax(0)
            for i, share in zip(keep, expected / n, strict=True):
                drawn = logprobs[out == i].double().exp()
                torch.testing.assert_close(drawn, share.expand(int(counts[i])), rtol=1e-6, atol=0)
            assert counts[token] == 0
            assert (counts[keep] - expected).abs().max() <= 1.01
        assert sample(scores[None], torch.zeros(1), torch.zeros(1), token)[0] == (5 if token == 0 else 0)


def test_rollout_draws_from_the_policys_own_distribution(folders, tokenizer, policy):
    """First tokens of 4,000 samples at temperature 0.7 against the plain softmax: chi-square within four deviations; the pad
    token, which has a tenth or more of the raw probability, never."""
    n, prompts = (
        4000,
        torch.randint(3, len(reviews.WORDS), (50, 4), generator=torch.Generator().manual_seed(0)),
    )
    with torch.no_grad():
        logits = plain(folders, "policy")(input_ids=prompts).logits[:, -1].double() / 0.7
    popular = (logits.softmax(-1)[:, PAD] - 0.3).abs().argmin().item()
    prompt, logits = prompts[popular].tolist(), logits[popular]
    assert 0.1 < logits.softmax(-1)[PAD] < 0.6
    logits[PAD] = -math.inf
    p = logits.softmax(-1)
    counts = torch.tensor(
        [r[0] for r in rollout(policy, tokenizer, [prompt] * n, 1, 0.7, (0, 1))[0]]
    ).bincount(minlength=len(p))
    assert counts[PAD] == 0
    common = p * n >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = torch.cat([p[common], p[~common].sum()[None]]) * n
    chi2, freedom = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item(), len(observed) - 1
    assert freedom >= 5 and chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_rollout_is_independent_of_batching_and_neighbours(tokenizer, policy):
    """Greedy and sampled: a response is the same for every --rollout-batch-size and whatever the other prompts are; the random
    numbers depend on seed and step."""
    prompts = [p for p, _ in sample_sequences(seed=5)]
    for temperature in (0.0, 0.8):
        whole = rollout(policy, tokenizer, prompts, 10, temperature, (0, 1))[0]
        for size in (1, 2):
            assert rollout(policy, tokenizer, prompts, 10, temperature, (0, 1), size)[0] == whole
        others = [p + p for p in prompts]
        others[2] = prompts[2]
        assert rollout(policy, tokenizer, others, 10, temperature, (0, 1))[0][2] == whole[2]
    for seed in ((0, 2), (1, 1)):
        assert rollout(policy, tokenizer, prompts, 10, 0.8, seed)[0] != whole
    assert rollout(policy, tokenizer, prompts[:1], 10, 0.8, (0, 1))[0] == whole[:1]
    assert policy.training  # as it was


def test_greedy_rollout_is_the_argmax_of_plain_logits(folders, tokenizer, policy):
    """In a left-padded ragged batch, each token is the best but pad after the tokens before it, by the unpadded plain model."""
    reference, prompts = plain(folders, "policy"), [p for p, _ in sample_sequences(seed=6)]
    for prompt, response in zip(prompts, rollout(policy, tokenizer, prompts, 8, 0.0, (0, 0))[0], strict=True):
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logits[:, PAD] = -math.inf
        assert response == logits.argmax(-1).tolist()


def test_a_cache_with_room_holds_what_transformers_own_holds(monkeypatch):
    """Token by token, past its room several times, rows repeated and dropped in between."""
    monkeypatch.setattr(rollout_room, "ROOM", 4)
    config = LlamaConfig(num_hidden_layers=1)
    (roomy,), (plain,) = rollout_room.roomy(config).layers, DynamicCache(config=config).layers
    assert type(roomy) is rollout_room.RoomyLayer
    for tokens, rows in (
        (3, [0, 0, 1, 1]),
        (1, None),
        (1, [3, 1]),
        (1, None),
        (5, None),
        (1, [1]),
        (7, None),
        (1, None),
    ):
        given = torch.randn(2, plain.keys.shape[0] if plain.is_initialized else 2, 2, tokens, 3)
        for layer in (roomy, plain):
            layer.update(*given)
            if rows:
                layer.batch_select_indices(torch.tensor(rows))
        assert torch.equal(roomy.keys, plain.keys) and torch.equal(roomy.values, plain.values)
        assert roomy.get_seq_length() == plain.get_seq_length() and roomy.room[0].shape[2] % 4 == 0


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probabilities_of_the_sampler_are_those_of_the_policy(tokenizer, policy, temperature):
    """What a token was drawn with is what one forward pass over the whole answer gives it; 0 after the end. Padding, ragged."""
    prompts, pad = [p for p, _ in sample_sequences(seed=7)] * 3, tokenizer.pad_token_id
    responses, sampled = rollout(policy, tokenizer, prompts, 25, temperature, (0, 1), 5)
    lengths = [len(r) for r in responses]
    assert (
        len(set(lengths)) > 2
        and sampled.shape == (len(prompts), max(lengths))
        and sampled.dtype == torch.float32
    )
    forward = lambda mb: policy.response_logprobs(**mb, temperature=temperature)[0]
    scored = run_micro_batches(forward, list(zip(prompts, responses, strict=True)), 3, pad, max(lengths))
    torch.testing.assert_close(sampled, scored, atol=1e-5, rtol=0)
    assert all((row[:n] < 0).all() and (row[n:] == 0).all() for row, n in zip(sampled, lengths, strict=True))
    nothing, sampled = rollout(policy, tokenizer, [], 25, temperature, (0, 1))  # of --eval-prompts 0
    assert nothing == [] and sampled.shape == (0, 0)


@pytest.mark.parametrize("window", [None, 6])
def test_rollout_past_the_room_of_its_cache(monkeypatch, window):
    """Greedy, against the plain model without a cache; a sliding window keeps transformers' own layers."""
    monkeypatch.setattr(rollout_room, "ROOM", 8)
    sizes = dict(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MistralConfig(**sizes, num_key_value_heads=1, sliding_window=window)
    ).eval()
    model.forbidden_token, prompts, n = None, [[5, 6, 7], [8] * 9, [5, 6, 7]], 20
    ones = torch.ones(3, dtype=torch.float64)
    with torch.no_grad():
        found = decode(model, prompts, torch.rand(3, n, dtype=torch.float64), 0 * ones, [-1], 0)
        for prompt, (response, _) in zip(prompts, found, strict=True):
            assert len(response) == n
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[
                0, len(prompt) - 1 : -1
            ]
            assert response == logits.argmax(-1).tolist()


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_first_eos_is_kept_and_nothing_after_it(folders, tokenizer, pad_is_eos):
    """A response ends with its first eos, or has max_new_tokens and none; also where pad is eos, which then can be sampled."""
    tokenizer = copy.deepcopy(tokenizer)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    model = load_model("policy", folders["policy"], tokenizer, ARGS, trained=False)
    prompts, limit = [p for p, _ in sample_sequences(seed=7)] * 8, 25
    responses = rollout(model, tokenizer, prompts, limit, 1.0, (0, 1))[0]
    ended = [r for r in responses if r[-1] == EOS]
    cut = [r for r in responses if r[-1] != EOS]
    assert len(ended) >= 5 and len(cut) >= 5 and len(set(map(len, ended))) > 3
    assert all(r.count(EOS) == 1 for r in ended)
    assert all(len(r) == limit and EOS not in r for r in cut)
    assert any(PAD in r for r in responses) == pad_is_eos  # there <pad> is a word like any other
    sequences = list(zip(prompts, responses, strict=True))
    forward = lambda mb: model.response_logprobs(**mb)[0]
    logprobs = run_micro_batches(forward, sequences, 8, tokenizer.pad_token_id, limit)
    lengths = torch.tensor([len(r) for r in responses])
    valid = torch.arange(limit)[None] < lengths[:, None]
    assert ((logprobs < 0) == valid).all()  # the final eos is trained even where it equals the padding


def test_the_pad_token_has_no_probability(folders, policy):
    """Where pad is not eos it is out of the normaliser: its log-probability is -inf in all but name."""
    batch = collate([([BOS, 7, 8], [9, PAD, 10])], PAD, "cpu")
    logprobs, _ = policy.response_logprobs(**batch)
    assert logprobs[0, 1] < -1e30 and (logprobs[0, [0, 2]] > -100).all()


# --- folders ---------------------------------------------------------------------------------------------------------


OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
root = sys.argv[1]
assert not any(name == "common" or name.startswith("common.") for name in sys.modules)
ids = torch.load(f"{root}/ids.pt")
policy, value = AutoModelForCausalLM.from_pretrained(f"{root}/p"), AutoModelForTokenClassification.from_pretrained(f"{root}/v")
tokenizer = AutoTokenizer.from_pretrained(f"{root}/p")
chat = tokenizer.apply_chat_template([{"role": "user", "content": "lunch"}], add_generation_prompt=True, return_dict=False)
with torch.no_grad():
    torch.save({"policy": policy(ids).logits, "value": value(ids).logits, "chat": chat, "score_std": value.config.score_std,
                "stop": policy.generation_config.eos_token_id}, f"{root}/out.pt")
"""


def test_exports_open_in_a_fresh_process_with_plain_transformers(folders, tokenizer, tmp_path):
    """After an optimizer step, a folder gives the trained model's values and logits without this repository, tokenizer and chat
    template included; a value model carries its statistics in its config."""
    sequences = sample_sequences(seed=8)
    batch = collate(sequences, PAD, "cpu")
    models = {
        kind: load_model(kind, folders[kind], tokenizer, ARGS, trained=True) for kind in ("policy", "value")
    }
    before = {}
    for kind, forward in (
        ("policy", lambda: models["policy"].response_logprobs(**batch)[0]),
        ("value", lambda: response_values(models["value"], **batch)),
    ):
        start = forward()
        backward((start**2).mean())
        optimizer_step(models[kind], adamw(models[kind], 0.0), 1e-2, start.sum().detach(), 1.0, "")
        before[kind] = forward().detach()
        assert (before[kind] - start).abs().max() > 1e-3
        extra = dict(score_std=1.5) if kind == "value" else {}
        export(models[kind], tokenizer, str(tmp_path / kind[0]), "fp32", **extra)
    torch.save(batch["input_ids"], tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", OPEN, str(tmp_path)], check=True, cwd=tmp_path, timeout=120)
    out = torch.load(tmp_path / "out.pt")
    assert out["chat"] == encode_prompt(tokenizer, "lunch") and out["score_std"] == 1.5 and out["stop"] == EOS
    out["policy"][:, :, PAD] = -math.inf
    table = out["policy"].log_softmax(-1)
    for i, (prompt, response) in enumerate(sequences):
        for t, token in enumerate(response):
            assert table[i, len(prompt) + t - 1, token].item() == pytest.approx(
                before["policy"][i, t].item(), abs=2e-5
            )
            assert out["value"][i, len(prompt) + t, 0].item() == pytest.approx(
                before["value"][i, t + 1].item(), abs=2e-5
            )


def test_tied_embeddings_stay_tied(tokenizer, tmp_path):
    """Through load, step and export, input and output embeddings are one tensor; the step is that of the unwrapped model."""
    name, shape = (
        str(tmp_path / "tied"),
        dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
    )
    torch.manual_seed(0)
    shape |= dict(vocab_size=len(reviews.WORDS), pad_token_id=PAD, initializer_range=0.2)
    config = LlamaConfig(tie_word_embeddings=True, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(name)
    model, reference = (
        load_model("policy", name, tokenizer, ARGS, trained=True),
        AutoModelForCausalLM.from_pretrained(name),
    )
    assert reference.config.tie_word_embeddings
    sequences = sample_sequences(seed=9)
    optimizer, theirs = (
        adamw(model, 0.0),
        torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0),
    )
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())
    for _ in range(2):
        loss = -model.response_logprobs(**collate(sequences, PAD, "cpu"))[0].sum()
        backward(loss)
        total, norm = optimizer_step(model, optimizer, 1e-2, loss, 1.0, "")
        plain_loss = 0.0
        for prompt, response in sequences:
            logits = reference(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logits = logits.index_fill(1, torch.tensor([PAD]), -math.inf)
            plain_loss = plain_loss - logits.log_softmax(-1)[range(len(response)), response].sum()
        plain_loss.backward()
        plain_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0).item()
        assert norm > 1.0  # the clip is at work
        assert (total, norm) == (
            pytest.approx(plain_loss.item(), rel=1e-4),
            pytest.approx(plain_norm, rel=1e-3),
        )
        theirs.step()
        theirs.zero_grad()
    export(model, tokenizer, str(tmp_path / "out"), "fp32")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.lm_head.weight is back.model.embed_tokens.weight
    ids = torch.tensor([[BOS, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, reference(ids).logits, rtol=0, atol=2e-3)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(folders, tokenizer):
    """NaN in the loss or in a gradient: SystemExit of one line that says where, weights as they were."""
    model = load_model("policy", folders["policy"], tokenizer, ARGS, trained=True)
    optimizer, before = adamw(model, 0.0), [p.clone() for p in model.parameters()]
    loss = model.response_logprobs(**collate(sample_sequences(), PAD, "cpu"))[0].sum()
    backward(loss)
    with pytest.raises(SystemExit, match="step 7, data rows .3."):
        optimizer_step(model, optimizer, 1e-2, loss.detach() * math.nan, 1.0, "step 7, data rows [3]")
    model.lm_head.weight.grad[0, 0] = math.inf
    with pytest.raises(SystemExit, match="gradient norm"):
        optimizer_step(model, optimizer, 1e-2, loss.detach(), 1.0, "")
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_a_frozen_reward_model_is_read_where_its_own_config_says(folders, tokenizer, tmp_path):
    """Its config's padding token decides where transformers reads the score, also where our tokenizer pads with another."""
    model = plain(folders, "reward")
    model.config.pad_token_id = 9
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = Reward(str(tmp_path), tokenizer, ARGS)
    sequences = [(p, r + [EOS]) for p, r in sample_sequences(seed=11)]
    assert all(9 not in p + r for p, r in sequences)
    got = judge([{"prompt": ""}] * len(sequences), sequences, [""] * len(sequences))
    for score, (prompt, response) in zip(got, sequences, strict=True):
        with torch.no_grad():
            assert score.item() == pytest.approx(
                model(input_ids=torch.tensor([prompt + response])).logits.item(), abs=2e-5
            )


def test_layers_of_a_model_that_lists_their_types_are_exported(tokenizer, tmp_path):
    """Qwen's config names the type of each layer; fewer layers must come with a shorter list."""
    shape = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = Qwen2Config(
        vocab_size=len(reviews.WORDS), pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **shape
    )
    assert len(config.layer_types) == 3
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "whole")
    model = load_model("value", str(tmp_path / "whole"), tokenizer, ARGS, trained=True, layers=2)
    export(model, tokenizer, str(tmp_path / "out"), "fp32")
    assert AutoModelForTokenClassification.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2


def test_a_value_model_is_no_policy(folders, tokenizer):
    """Its folder has no output layer; a random one must not be put in its place."""
    with pytest.raises(SystemExit, match="weights missing for a policy model: lm_head.weight"):
        load_model("policy", folders["value"], tokenizer, ARGS, trained=True)


def test_layers_keeps_the_first_ones(folders, tokenizer):
    """`layers=1` is the folder's first layer under its own head, not a fresh one."""
    model = load_model("value", folders["value"], tokenizer, ARGS, trained=False, layers=1)
    reference = plain(folders, "value")
    reference.model.layers = reference.model.layers[:1]
    batch = collate(sample_sequences(), PAD, "cpu")
    with torch.no_grad():
        expected = reference(input_ids=batch["input_ids"]).logits[2, 0, 0]
    torch.testing.assert_close(response_values(model, **batch)[2, 0], expected, rtol=0, atol=2e-5)


# --- rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_reward_model_scores_do_not_depend_on_padding(folders, tokenizer, pad_is_eos):
    """A ragged batch of answers that end with eos scores as plain transformers does one by one, at the last token that is not
    padding."""
    pad = EOS if pad_is_eos else PAD
    tokenizer, reference = copy.deepcopy(tokenizer), plain(folders, "reward")
    tokenizer.pad_token = reviews.SPECIAL[pad]
    model = load_model("reward", folders["reward"], tokenizer, ARGS, trained=True)
    sequences = [(p, r + [EOS]) for p, r in sample_sequences(seed=10)]
    got = run_micro_batches(lambda mb: sequence_scores(model, **mb), sequences, 2, pad, 1)[:, 0]
    for score, (prompt, response) in zip(got, sequences, strict=True):
        tokens = prompt + response
        with torch.no_grad():
            hidden = reference.model(input_ids=torch.tensor([tokens])).last_hidden_state[
                0, -2 if pad_is_eos else -1
            ]
            assert score.item() == pytest.approx(reference.score(hidden).item(), abs=2e-5)
    assert got.std() > 0.1


def test_reward_folder_is_standardised_and_reads_text_where_tokenizers_differ(folders, tokenizer, tmp_path):
    """(score - score_mean) / score_std of the config; another tokenizer means its own chat template and its own tokens."""
    model = plain(folders, "reward")
    model.config.score_mean, model.config.score_std = 0.5, 2.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [{"prompt": "lunch : the soup ?"}, {"prompt": "dinner : the view and the wine ?"}]
    texts = ["the soup was warm .", "the view was not bad and the wine was good ."]
    tokens = tokenize(
        [{**r, "response": t} for r, t in zip(rows, texts, strict=True)], tokenizer, ("response",), 99, 99, ""
    )
    sequences = [(r["prompt_ids"], r["response_ids"]) for r in tokens]
    same = Reward(str(tmp_path), tokenizer, ARGS)(rows, sequences, texts)
    for score, (prompt, response) in zip(same, sequences, strict=True):
        with torch.no_grad():
            raw = model(input_ids=torch.tensor([prompt + response])).logits.item()
        assert score.item() == pytest.approx((raw - 0.5) / 2.0, abs=2e-5)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["zebra"])
    rubbish = [([7], [8])] * 2  # tokens of another vocabulary: not to be read
    torch.testing.assert_close(
        Reward(str(tmp_path), other, ARGS)(rows, rubbish, texts), same, rtol=0, atol=1e-6
    )


def test_a_critic_from_a_reward_model_starts_at_its_standardised_score(folders, tokenizer, tmp_path):
    """PPO's critic from reward.py's folder: at the last token it gives the score that Reward gives, once standardised."""
    model = plain(folders, "reward")
    model.config.score_mean, model.config.score_std = 0.5, 2.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sequences = sample_sequences(seed=11)
    critic = load_model("value", str(tmp_path), tokenizer, ARGS, trained=True)
    mask = collate(sequences, PAD, "cpu")["response_mask"]
    values = run_micro_batches(lambda mb: response_values(critic, **mb), sequences, 2, PAD, mask.shape[1] + 1)
    scores = Reward(str(tmp_path), tokenizer, ARGS)([{}] * len(sequences), sequences, [""] * len(sequences))
    torch.testing.assert_close(
        values.gather(1, mask.sum(1, keepdim=True)).squeeze(1), scores, rtol=0, atol=2e-5
    )
    export(critic, tokenizer, str(tmp_path / "out"), "fp32")
    again = load_model(
        "value", str(tmp_path / "out"), tokenizer, ARGS, trained=False
    )  # not standardised a second time
    torch.testing.assert_close(
        response_values(again, **collate(sequences, PAD, "cpu")), values, rtol=0, atol=2e-5
    )


def test_reward_function_gets_columns_and_must_be_finite(tokenizer, tmp_path, monkeypatch):
    """(prompts, responses, **columns) in order; NaN stops with a line that names function and response; so does a bad name."""
    (tmp_path / "judge_of_tests.py").write_text(
        "def f(prompts, responses, gold, **others):\n"
        "    assert set(others) == {'row'}\n"
        "    return [10 * p + g + len(r) for p, r, g in zip(map(len, prompts), responses, gold)]\n"
        "def nan(prompts, responses, **_):\n    return [0.0, float('nan'), 1.0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"prompt": "p" * i, "gold": i / 8, "row": i, "prompt_ids": [1]} for i in (1, 2, 3)]
    texts, sequences = ["a", "bb", "cccc"], [([1], [2])] * 3
    score = Reward("judge_of_tests:f", tokenizer, ARGS)
    assert score(rows, sequences, texts).tolist() == [11.125, 22.25, 34.375] and score.label == "f"
    with pytest.raises(SystemExit) as stop:
        Reward("judge_of_tests:nan", tokenizer, ARGS)(rows, sequences, texts)
    assert (
        "judge_of_tests:nan gave nan" in str(stop.value)
        and "'bb'" in str(stop.value)
        and "\n" not in str(stop.value)
    )
    for name in ("judge_of_tests:missing", "no_such_module:f"):
        with pytest.raises(SystemExit, match=f"--reward {name}"):
            Reward(name, tokenizer, ARGS)


@pytest.mark.parametrize("kind", ["value", "reward"])
def test_a_frozen_model_without_its_head_is_refused(folders, tokenizer, kind):
    """`--gvm` or `--reward` given a policy's folder must say so: a zero head would score everything 0."""
    with pytest.raises(SystemExit):
        load_model(kind, folders["policy"], tokenizer, ARGS, trained=False)


def test_an_exported_policy_stops_where_the_rollout_did(folders, tokenizer, tmp_path):
    """generation_config.json names the chat template's end of turn, where that is not the eos, beside the eos."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<eos>", "<user>")  # any special token
    model = load_model("policy", folders["policy"], other, ARGS, trained=False)
    export(model, other, str(tmp_path / "out"), "fp32")
    stops = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id
    assert sorted([stops] if isinstance(stops, int) else stops) == sorted({EOS, stop_token(other)}) != [EOS]


def test_generation_settings_reach_the_export_but_not_the_rollout(folders, tokenizer, tmp_path):
    """A repetition penalty of the folder's generation config would make the rollout sample what no log-probability is of."""
    source = plain(folders, "policy")
    source.generation_config.repetition_penalty = 5.0
    source.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    policy = load_model("policy", str(tmp_path / "in"), tokenizer, ARGS, trained=False)
    prompts = [[BOS, 7, 8], [BOS, 9]] * 4
    unlike = load_model("policy", folders["policy"], tokenizer, ARGS, trained=False)
    assert (
        rollout(policy, tokenizer, prompts, 12, 1.0, (0, 0))[0]
        == rollout(unlike, tokenizer, prompts, 12, 1.0, (0, 0))[0]
    )
    export(policy, tokenizer, str(tmp_path / "out"), "fp32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.repetition_penalty == 5.0


def test_tokenizer_without_a_pad_token_pads_with_eos(folders, tokenizer, tmp_path):
    """load_tokenizer gives such a tokenizer its eos for padding."""
    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    plain(folders, "policy").save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id is None
    assert load_tokenizer(str(tmp_path)).pad_token_id == EOS
