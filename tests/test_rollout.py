"""Sampling, and that what samples is what trains.

Arguments reach every model class, a faulty sampler ends the run at once, drift is named.
"""

import copy
import functools
import importlib
import json
import math
from types import SimpleNamespace

import helpers
import pytest
import torch
import transformers
from random_models import EOS, PAD, plain, sample_sequences
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)

from assets import reviews
from common import distributed
from common import rollout as sampler
from common.batches import run_micro_batches
from common.checks import TOLERANCE, disturbed
from common.models import load_model
from common.rollout import Filters, batches_of, check_sampler, decode, rollout, sample, sample_filtered
from common.tokenization import load_tokenizer

pytestmark = pytest.mark.usefixtures("group")
ARGS = SimpleNamespace(
    precision="fp32",
    shard_size=0,
    gradient_checkpointing=False,
    micro_batch_size=3,
    lora_rank=0,
    lora_alpha=8.0,
    lora_dropout=0.0,
    lora_merge=True,
)
ONLINE = ("dvpo", "ppo", "grpo", "remax")
OFFLINE = ("sft", "rpo", "dro", "kto", "dpo")


# --- one token, one batch, all prompts


def test_inverse_cdf_over_a_grid_of_uniforms_has_the_softmax_frequencies():
    """Exact: over N evenly spaced numbers each token is drawn N p times, to one; a forbidden token never, u =
    0 included."""
    n = 100_000
    scores = torch.tensor([3.0, 1.0, 0.5, -0.7, 1.7, 9.0])
    forbidden = (0, 5)
    for token in forbidden:
        keep = [i for i in range(6) if i != token]
        for temperature in (0.7, 1.0):
            heat = torch.full((n,), temperature)
            out, logprobs = sample(
                scores.repeat(n, 1), torch.arange(n).double() / n, heat, torch.tensor([token])
            )
            counts = out.bincount(minlength=6)
            expected = n * (scores[keep].double() / heat[0]).softmax(0)
            for i, share in zip(keep, expected / n, strict=True):
                drawn = logprobs[out == i].double().exp()
                torch.testing.assert_close(drawn, share.expand(int(counts[i])), rtol=1e-6, atol=0)
            assert counts[token] == 0
            assert (counts[keep] - expected).abs().max() <= 1.01
        first, _ = sample(scores[None], torch.zeros(1), torch.zeros(1), torch.tensor([token]))
        assert first == (5 if token == 0 else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_a_caller_says_of_the_temperatures_changes_nothing(dtype):
    """`any_greedy` and `any_scaled` save work where they are False, and the logits of the caller stay as they
    are."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 30, generator=generator).to(dtype)
    uniforms = torch.rand(200, generator=generator).double()
    before = logits.clone()
    for heats in ([1.0], [0.0], [0.7], [0.0, 1.0], [0.7, 1.0], [0.0, 0.7]):
        temperatures = torch.tensor(heats, dtype=torch.float64).repeat(200 // len(heats))
        flags = dict(any_greedy=0.0 in heats, any_scaled=0.7 in heats)
        for forbidden in (None, torch.tensor([3]), torch.tensor([0, 3, 29])):
            tokens, logprobs = sample(logits, uniforms, temperatures, forbidden)
            same_tokens, same_logprobs = sample(logits, uniforms, temperatures, forbidden, **flags)
            assert torch.equal(tokens, same_tokens) and torch.equal(logprobs, same_logprobs)
            assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(logits, before)


def test_rollout_draws_from_the_policys_own_distribution(folders, tokenizer, policy):
    """First tokens of 4,000 samples at temperature 0.7 against the plain softmax: chi-square within four
    deviations; the pad token, which has a tenth or more of the raw probability, never."""
    n = 4000
    prompts = torch.randint(3, len(reviews.WORDS), (50, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = plain(folders, "policy")(input_ids=prompts).logits[:, -1].double() / 0.7
    popular = (logits.softmax(-1)[:, PAD] - 0.3).abs().argmin().item()
    prompt = prompts[popular].tolist()
    logits = logits[popular]
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
    chi2 = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    freedom = len(observed) - 1
    assert freedom >= 5 and chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_rollout_is_independent_of_batching_and_neighbours(tokenizer, policy):
    """Greedy and sampled: a response is the same for every --rollout-batch-size and whatever the other
    prompts are; the random numbers depend on seed and step."""
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
    """In a left-padded ragged batch, each token is the best but pad after the tokens before it, by the
    unpadded plain model."""
    reference = plain(folders, "policy")
    prompts = [p for p, _ in sample_sequences(seed=6)]
    for prompt, response in zip(prompts, rollout(policy, tokenizer, prompts, 8, 0.0, (0, 0))[0], strict=True):
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logits[:, PAD] = -math.inf
        assert response == logits.argmax(-1).tolist()


def test_a_cache_with_room_holds_what_transformers_own_holds(monkeypatch):
    """Token by token, past its room several times, rows repeated and dropped in between."""
    monkeypatch.setattr(sampler, "ROOM", 4)
    config = LlamaConfig(num_hidden_layers=1)
    (roomy,) = sampler.roomy(config).layers
    (plain,) = DynamicCache(config=config).layers
    assert type(roomy) is sampler.RoomyLayer
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
                layer.reorder_cache(torch.tensor(rows))
        assert torch.equal(roomy.keys, plain.keys) and torch.equal(roomy.values, plain.values)
        assert roomy.get_seq_length() == plain.get_seq_length() and roomy.room[0].shape[2] % 4 == 0


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probabilities_of_the_sampler_are_those_of_the_policy(tokenizer, policy, temperature):
    """What a token was drawn with is what one forward pass over the whole answer gives it; 0 after the end.
    Padding, ragged."""
    prompts = [p for p, _ in sample_sequences(seed=7)] * 3
    pad = tokenizer.pad_token_id
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
    monkeypatch.setattr(sampler, "ROOM", 8)
    sizes = dict(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MistralConfig(**sizes, num_key_value_heads=1, sliding_window=window)
    ).eval()
    model.forbidden_tokens = None
    prompts = [[5, 6, 7], [8] * 9, [5, 6, 7]]
    n = 20
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
    """A response ends with its first eos, or has max_new_tokens and none; also where pad is eos, which then
    can be sampled."""
    tokenizer = copy.deepcopy(tokenizer)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    model = load_model("policy", folders["policy"], tokenizer, ARGS, trained=False)
    prompts = [p for p, _ in sample_sequences(seed=7)] * 8
    limit = 25
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


# --- every argument reaches every model class ---------------------------------------------------------------

VOCABULARY = 61
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)
FAMILIES = {  # rotary, learned and ALiBi positions; sliding windows; experts; parallel blocks
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA | dict(head_dim=8),
    "mistral": LLAMA | dict(sliding_window=5),
    "gemma": LLAMA | dict(head_dim=8),
    "gemma3_text": LLAMA
    | dict(head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "olmo2": LLAMA,
    "phi": LLAMA,
    "starcoder2": LLAMA,
    "mixtral": LLAMA | dict(num_local_experts=4),
    "gpt_neox": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": GPT | dict(rotary_dim=4),
    "gpt_neo": dict(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=5
    ),
    "opt": dict(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "mpt": dict(d_model=32, n_layers=2, n_heads=4),
    "falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "biogpt": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    "t5": dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0),
}


def tiny(family, **more):
    """A random model whose weights are so large that no distribution is uniform and every argument
    matters."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=VOCABULARY, **IDS, **FAMILIES[family], **more
    )
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.forbidden_tokens = None
    return model


def plain_logprobs(model, prompt, response, temperature=1.0):
    """One sequence alone, without cache, mask or padding."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            read = torch.tensor([[model.config.decoder_start_token_id, *response[:-1]]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=read, use_cache=False).logits[
                0
            ]
        else:
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[
                0, len(prompt) - 1 : -1
            ]
    logprobs = (logits.double() / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(response)[:, None]).squeeze(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_gives_every_model_class_its_cache_mask_and_positions(family):
    """By what arrives in forward, whatever it is called there, and by the numbers: each token's
    log-probability is that of the sequence alone. One prompt twice, others of other lengths; one ends
    early."""
    model = tiny(family)
    encoder_decoder = model.config.is_encoder_decoder
    seen = []

    def watch(module, args, kwargs):
        seen.append(kwargs)

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16], [12, 13, 14]]
    uniforms = torch.rand(4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    with torch.no_grad():
        free = decode(model, prompts, uniforms, ones, [], 0)
        stop = free[2][0][4]
        seen.clear()
        found = decode(model, prompts, uniforms, ones, [stop], 0)
    handle.remove()
    assert len(seen) >= 5 and len({len(tokens) for tokens, _ in found}) > 1
    for prompt, (tokens, logprobs) in zip(prompts, found, strict=True):
        off = (torch.tensor(logprobs).double() - plain_logprobs(model, prompt, tokens)).abs().max().item()
        assert off < 1e-4, f"{family}: {off} nats"

    takes = [name for name in sampler.inspect.signature(model.forward).parameters if "position" in name]
    for step, kwargs in enumerate(seen):
        caches = [value for value in kwargs.values() if isinstance(value, Cache)]
        assert len(caches) == 1 or (encoder_decoder and step == 0), f"{family}: no cache in step {step}"
        mask = kwargs["attention_mask"]
        assert (mask == 0).any() or step, "no padding: this test would not see a mask that is dropped"
        if not encoder_decoder:
            feed = kwargs["input_ids"]
            assert feed.shape[1] == (1 if step else 7)
            assert mask.shape == (len(feed), 7 + step)
            for name in takes:
                expected = (mask.cumsum(1) - 1).clamp(min=0)[:, -feed.shape[1] :]
                assert torch.equal(kwargs[name], expected), f"{family}: {name} in step {step}"


FILTERS = {
    "top-k": Filters(top_k=3),
    "top-p": Filters(top_p=0.6),
    "penalty": Filters(repetition_penalty=1.7),
    "reward for repetition": Filters(repetition_penalty=0.6),
    # each narrows what the one before leaves: another order is another distribution
    "all": Filters(top_k=6, top_p=0.7, repetition_penalty=1.3),
}


# greedy, the likeliest token is always among those that top-k and top-p leave
FILTERED = [(name, 0.8) for name in FILTERS] + [(name, 0.0) for name in FILTERS if not name.startswith("top")]


@pytest.mark.parametrize("name, temperature", FILTERED)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_filters_are_those_of_generate(monkeypatch, family, name, temperature):
    """With the same random numbers the responses are those of transformers' `generate` to each prompt alone.
    Here they are in one batch with padding, whose token is also the one that ends a response, as for GPT-2."""
    filters = FILTERS[name]
    model = tiny(family)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16], [12, 13, 14]]
    uniforms = torch.rand(4, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    temperatures = torch.full((4,), temperature, dtype=torch.float64)
    with torch.no_grad():
        free = decode(model, prompts, uniforms, temperatures, [], 0, filters)
        plain = decode(model, prompts, uniforms, temperatures, [], 0)
        end = free[2][0][4]
        found = decode(model, prompts, uniforms, temperatures, [end], end, filters)
    assert [tokens for tokens, _ in free] != [tokens for tokens, _ in plain]
    draws = []

    def inverse_cdf(probs, num_samples):
        u = draws.pop(0)
        return torch.searchsorted(probs.double().cumsum(-1), u.expand(1, 1), right=True)

    monkeypatch.setattr(torch, "multinomial", inverse_cdf)
    options = dict(do_sample=temperature > 0, max_new_tokens=20, eos_token_id=end, pad_token_id=end)
    if temperature:
        options |= dict(temperature=temperature, top_k=filters.top_k, top_p=filters.top_p)
    for prompt, numbers, (tokens, logprobs) in zip(prompts, uniforms, found, strict=True):
        draws[:] = numbers
        given = torch.tensor([prompt])
        out = model.generate(given, **options, repetition_penalty=filters.repetition_penalty)[0]
        start = 1 if family == "t5" else len(prompt)
        assert tokens == out[start:].tolist()
        # without filters, so that they can be compared with the policy's
        own = plain_logprobs(model, prompt, tokens, temperature or 1.0)
        assert (torch.tensor(logprobs).double() - own).abs().max().item() < 1e-4


def test_filtered_tokens_have_their_share_of_the_probability():
    """Exact, over N evenly spaced numbers; a forbidden token is not among the k likeliest."""
    n = 10_000
    probs = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    uniforms = torch.arange(n).double() / n
    said = torch.full((n, 1), 1)
    for filters, forbidden, expected in (
        (Filters(top_k=2), None, {0: 4 / 7, 1: 3 / 7}),
        (Filters(top_k=2), torch.tensor([0]), {1: 2 / 3, 2: 1 / 3}),
        (Filters(top_p=0.75), None, {0: 8 / 17, 1: 6 / 17, 2: 3 / 17}),  # the one that passes 0.75 is in
        (Filters(top_p=1e-9), None, {0: 1.0}),
    ):
        tokens, logprobs = sample_filtered(
            probs.log().repeat(n, 1), uniforms, torch.ones(n), forbidden, filters, said
        )
        counts = tokens.bincount(minlength=5).tolist()
        for token, count in enumerate(counts):
            assert abs(count - n * expected.get(token, 0.0)) <= 1.01, (filters, token)
        left = 1.0 if forbidden is None else 0.6
        torch.testing.assert_close(logprobs.exp(), probs[tokens] / left)


def test_a_filtered_rollout_is_compared_with_the_policy(tokenizer, policy):
    """As any other: the log-probabilities are those of the whole distribution, and a wrong one ends the run."""
    prompts = [[5, 6, 7, 8], [9, 10]] * 3
    filters = Filters(top_k=2, repetition_penalty=1.5)
    narrow, sampled = rollout(policy, tokenizer, prompts, 8, 1.0, (0, 0), filters=filters)
    wide, _ = rollout(policy, tokenizer, prompts, 8, 1.0, (0, 0))
    assert narrow != wide
    again, _ = rollout(policy, tokenizer, prompts[:2], 8, 1.0, (0, 0), filters=filters)
    assert again == narrow[:2]  # whatever else is in the batch
    assert (sampled <= 0).all() and sampled.min() < -0.5


class OtherName(LlamaForCausalLM):
    """A library that renames once more: whatever else comes is swallowed."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, memory=None, **kwargs):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)


class NoMask(LlamaForCausalLM):
    def forward(self, input_ids=None, position_ids=None, cache=None, past_key_values=None, **kwargs):
        return super().forward(input_ids=input_ids, position_ids=position_ids)


@pytest.mark.parametrize(
    "kind, words", [(OtherName, "takes no key-value cache as cache or past"), (NoMask, "no attention_mask")]
)
def test_a_model_that_takes_no_cache_or_no_mask_is_one_line(kind, words):
    model = tiny("llama")
    model.__class__ = kind
    with pytest.raises(
        SystemExit, match=f"^error: .*{words}.*transformers {transformers.__version__} is installed"
    ):
        decode(model, [[5, 6, 7]], torch.rand(1, 3), torch.ones(1), [], 0)


# --- a faulty sampler ends the run in its first step --------------------------------------------------------


def drop(module, argument):
    """The models' forward still names the argument, and loses it: what a renamed one did."""
    for kind in (LlamaForCausalLM, transformers.GPT2LMHeadModel):
        lose(kind, argument)


def lose(kind, argument):
    real = kind.forward

    @functools.wraps(real)
    def forward(self, *args, **kwargs):
        names = sampler.CACHE_NAMES if argument == "cache" else (argument,)
        return real(self, *args, **{name: value for name, value in kwargs.items() if name not in names})

    kind.forward = forward


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A policy with learned positions: a Llama's rotary ones are the same wherever a prompt begins."""
    name = str(tmp_path_factory.mktemp("gpt2"))
    tokenizer = load_tokenizer(reviews.folder("untrained"))
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), **GPT, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(name)
    tokenizer.save_pretrained(name)
    return name


@pytest.mark.parametrize("script", [*ONLINE, *OFFLINE])
def test_without_its_cache_no_script_trains(world, script):
    """One line that names the cause, in every script that samples; the folder is free for the next try."""
    patch = functools.partial(drop, argument="cache")
    name = f"runs/no-cache-{script}"
    line = world.run(script, patch=patch, **helpers.ARGS[script], run_dir=name).error()
    assert "nats a token off the policy's" in line and "the key-value cache does not reach the model" in line
    assert transformers.__version__ in line and not world.path(name).joinpath("metrics.jsonl").exists()


@pytest.mark.parametrize("argument", ["position_ids", "attention_mask"])
@pytest.mark.parametrize("processes", [0, 2])
def test_without_positions_or_mask_prompts_are_not_padded(world, gpt2, argument, processes):
    """Prompts of one length are sampled together, which is said, and what samples is what trains."""
    patch = functools.partial(drop, argument=argument)
    args = helpers.ARGS["grpo"] | dict(
        model=gpt2, run_dir=f"runs/no-{argument}-{processes}", precision="fp32"
    )
    output = world.run("grpo", ranks=processes, patch=patch, **args).ok().output
    assert "a gpt2 model: prompts of different lengths are sampled apart" in output
    rows = [row for row in helpers.metrics(world.path(args["run_dir"])) if "rollout/mismatch" in row]
    assert rows and all(row["rollout/mismatch"] < 1e-9 for row in rows)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 100])
def test_batches_of_one_length(size):
    lengths = [2, 2, 2, 3, 5, 5]
    for padded in (True, False):
        batches = list(batches_of(lengths, size, padded))
        assert [i for start, end in batches for i in range(start, end)] == list(range(6))
        assert all(0 < end - start <= (size or 6) for start, end in batches)
        if not padded:
            assert all(len({*lengths[start:end]}) == 1 for start, end in batches)
    assert list(batches_of([], size, True)) == []


def test_padding_that_changes_answers_does_not_hide_another_fault(world, gpt2):
    """Without a cache no batch is right, padded or not."""
    args = helpers.ARGS["grpo"] | dict(model=gpt2, run_dir="runs/both-faults")
    line = world.run("grpo", patch=functools.partial(drop, argument="cache"), **args).error()
    assert "the key-value cache does not reach the model" in line


@pytest.mark.parametrize("script", ["grpo", "sft"])
def test_a_resumed_run_is_checked_again(world, script):
    name = f"runs/resumed-{script}"
    args = helpers.ARGS[script] | dict(save_every=1)
    world.run(script, **args | dict(steps=2), run_dir=name).ok()
    before = world.path(name).joinpath("metrics.jsonl").read_text()
    line = world.run(
        script, patch=functools.partial(drop, argument="cache"), **args, run_dir=name, resume=True
    ).error()
    assert "the key-value cache does not reach the model" in line
    assert world.path(name).joinpath("metrics.jsonl").read_text() == before
    world.run(script, **args, run_dir=name, resume=True).ok()


def test_evaluate_checks_what_it_samples(world):
    """`evaluate.py responses`: no response is written that a faulty sampler drew."""
    from evaluate import COMMANDS

    kind, defaults, command = COMMANDS["responses"]
    args = kind(
        **defaults
        | dict(models=(reviews.folder("policy"),), dataset="scored.jsonl", run_dir="runs/faulty-responses")
    )

    call = functools.partial(with_fault, command.__module__, command.__name__, args)
    line = helpers.Job(world.folder, call, 0).wait().error()
    assert "the key-value cache does not reach the model" in line
    assert not list(world.path("runs/faulty-responses").rglob("alpaca_eval.json"))


def with_fault(module, name, args):
    drop(None, "cache")
    distributed.launch(getattr(importlib.import_module(module), name), args)


def fault_in_second_batch(module, name, args):
    """From the second batch on the sampler says that it drew each token with half its probability."""
    real = sampler.sample_all
    calls = []

    def sample_all(*given):
        responses, sampled = real(*given)
        calls.append(1)
        if len(calls) > 1:
            sampled = sampled + torch.tensor(0.5).log()
        return responses, sampled

    sampler.sample_all = sample_all
    distributed.launch(getattr(importlib.import_module(module), name), args)


def test_every_batch_of_a_frozen_policy_is_right_or_refused(world):
    """`evaluate.py responses`: a fault that the first batch does not show (all its prompts of one length, say)."""
    from evaluate import COMMANDS

    kind, defaults, command = COMMANDS["responses"]
    given = dict(models=(reviews.folder("policy"),), dataset="scored.jsonl", run_dir="runs/second-batch")
    args = kind(**defaults | given | dict(part="all", max_prompt_length=32, batch_size=4, prompts=12))
    call = functools.partial(fault_in_second_batch, command.__module__, command.__name__, args)
    line = helpers.Job(world.folder, call, 0).wait().error()
    assert "0.693 nats a token off the policy's" in line
    (file,) = world.path("runs/second-batch").rglob("responses.jsonl")
    assert len(file.read_text().splitlines()) == 4  # the batch before it


def leave_adapters_out(module):
    """The sampler's forward passes alone are without them."""
    real = sampler.decode

    def decode(policy, *args):
        layers = [layer for layer in policy.modules() if hasattr(layer, "lora_A")]
        assert layers
        for layer in layers:
            layer._disable_adapters = True
        try:
            return real(policy, *args)
        finally:
            for layer in layers:
                layer._disable_adapters = False

    sampler.decode = decode


@pytest.mark.parametrize("script", ["grpo", "sft"])
def test_a_sampler_without_the_adapters_is_found_before_they_differ_from_zero(world, script):
    pytest.importorskip("peft", reason="LoRA needs peft: pip install peft")
    args = helpers.ARGS[script] | dict(lora_rank=4, run_dir=f"runs/no-adapters-{script}")
    line = world.run(script, patch=leave_adapters_out, **args).error()
    assert "leaves out LoRA adapters or keeps older weights" in line


class Stale:
    """A sampling engine with weights of its own, as vLLM has; `load` copies the policy's."""

    def __init__(self, policy, fresh):
        self.fresh = fresh
        self.loads = 0
        self.copy = {name: p.detach().clone() for name, p in policy.named_parameters()}

    def generate(self, policy, prompts, seeds, temperatures, limit, stops, filters):
        self.loads += 1
        uniforms = [
            torch.rand(limit, generator=torch.Generator().manual_seed(seed)).double() for seed in seeds
        ]
        if self.fresh(self.loads):
            self.copy = {name: p.detach().clone() for name, p in policy.named_parameters()}
        now = {name: p.detach().clone() for name, p in policy.named_parameters()}
        with torch.no_grad():
            for name, p in policy.named_parameters():
                p.copy_(self.copy[name])
        heat = torch.tensor(temperatures, dtype=torch.float64)
        found = decode(policy, prompts, torch.stack(uniforms), heat, stops, 0)
        with torch.no_grad():
            for name, p in policy.named_parameters():
                p.copy_(now[name])
        return found


FRESH = {
    "always": lambda load: True,
    "never": lambda load: False,  # right at the start, and never told of an update
    "every other": lambda load: load % 2 == 0,
}


def stale_engine(module, how):
    module.vllm.start = lambda policy, name, args: (Stale(policy, FRESH[how]), 0.0)


@pytest.mark.parametrize("script", ONLINE)
def test_an_engine_that_keeps_older_weights_ends_the_run(world, script):
    args = helpers.ARGS[script] | dict(save_every=0)
    for how in ("never", "every other"):
        line = world.run(
            script, patch=functools.partial(stale_engine, how=how), **args, run_dir=f"runs/{how}-{script}"
        ).error()
        assert "nats a token" in line, how
        log = world.path(f"runs/{how}-{script}/metrics.jsonl")
        assert not log.exists() or not log.read_text(), how
    own = f"runs/own-{script}"
    engine = f"runs/engine-{script}"
    world.run(script, **args, run_dir=own).ok()
    world.run(script, patch=functools.partial(stale_engine, how="always"), **args, run_dir=engine).ok()
    assert helpers.metrics(world.path(own)) == helpers.metrics(world.path(engine))


def test_weights_are_what_they_were(monkeypatch):
    """Bit for bit, after the check; all of them were disturbed in between, the zeros too."""
    name = reviews.folder("policy")
    tokenizer = load_tokenizer(name)
    policy = load_model("policy", name, tokenizer, ARGS, trained=True)
    before = {key: p.detach().clone() for key, p in policy.named_parameters()}
    with torch.no_grad():
        zero = policy.model.norm.weight
        zero.zero_()
        with disturbed(policy, 0.5):
            assert (
                all(not torch.equal(p, before[key]) for key, p in policy.named_parameters())
                and zero.abs().max() > 0
            )
        assert not zero.any()
        zero.copy_(before["model.norm.weight"])
    check_sampler(policy, tokenizer, [[1, 9, 12, 20], [1, 8], [1, 5, 6]], 8, 1.0)
    assert all(torch.equal(p, before[key]) for key, p in policy.named_parameters()) and policy.training
    check_sampler(policy, tokenizer, [], 8, 1.0)  # of --eval-prompts 0: nothing to sample


def test_tolerance_is_between_rounding_and_the_faults():
    """In each type that computes, the embedded policy is well within it, and an older policy well beyond."""
    tokenizer = load_tokenizer(reviews.folder("policy"))
    prompts = [[1, 9, 12, 20], [1, 8], [1, 5, 6], [1, 8, 7, 7, 7, 9]]
    for precision, kind in (("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        args = SimpleNamespace(**vars(ARGS) | dict(precision=precision))
        policy = load_model("policy", reviews.folder("policy"), tokenizer, args, trained=False)
        assert policy.compute_dtype == kind
        responses, sampled = sampler.sample_all(policy, prompts, 16, [1.0, 0.5, 0.0, 1.0], (0, 0), 0, [], 0)
        off = sampler.differences(policy, prompts, responses, sampled, [1.0, 0.5, 0.0, 1.0])
        assert [len(x) for x in off] == [16] * 4
        assert sampler.mean_of(off) < TOLERANCE[kind] / 3
        sampler.require_agreement(policy, prompts, off)
        with pytest.raises(SystemExit, match="even the first token"):
            sampler.require_agreement(policy, prompts, [x + 2 * TOLERANCE[kind] for x in off])
        with pytest.raises(SystemExit, match="nan nats"):
            sampler.require_agreement(policy, prompts, [x * math.nan for x in off])


# --- drift is named -----------------------------------------------------------------------------------------


def drift_later(module):
    """From the fifth rollout on the sampler says that it drew each token with half its probability."""
    real = sampler.sample_all
    count = []

    def sample_all(*args):
        responses, sampled = real(*args)
        count.append(1)
        return responses, sampled + (len(count) > 5) * torch.tensor(0.5).log()

    sampler.sample_all = sample_all


# Calls of sample_all: three of check_sampler, an evaluation before the first step (not of sft.py), one after each of
# the four steps, and of the online scripts a rollout per step. All after the fifth are off.
DRIFTING = dict.fromkeys(ONLINE, 7) | dict.fromkeys(OFFLINE, 3) | {"sft": 2}


@pytest.mark.parametrize("script, args", [*((script, {}) for script in DRIFTING), ("grpo", {"beta": 0.0})])
def test_later_rollouts_that_drift_are_named(world, script, args):
    """Each of them, by its step where the script has the policy's log-probabilities at hand. (Not in an evaluation
    without a reference.)"""
    args = helpers.ARGS[script] | dict(steps=4, eval_every=1, overwrite=True) | args
    output = world.run(script, patch=drift_later, **args, run_dir=f"runs/drift-{script}").ok().output
    named = [line for line in output.splitlines() if "0.693 nats a token off the policy's" in line]
    assert len(named) == DRIFTING[script]
    assert all("rounding in float32" in line for line in named)
    by_step = [line for line in named if line.startswith("step ")]
    if script in OFFLINE:
        assert not by_step
    elif args.get("beta") == 0:
        assert len(by_step) == 3
    else:
        assert len(by_step) == 7
    sound = world.run(script, **args, run_dir=f"runs/sound-{script}").ok().output
    assert "nats a token off" not in sound


# --- weights that are not read ------------------------------------------------------------------------------


def test_weights_without_a_place_are_named_and_a_judge_is_no_policy(tmp_path, capsys):
    tokenizer = load_tokenizer(reviews.folder("untrained"))
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), **LLAMA, **IDS, tie_word_embeddings=True, num_labels=1
    )
    value = transformers.AutoModelForTokenClassification.from_config(config)
    value.save_pretrained(tmp_path / "value"), tokenizer.save_pretrained(tmp_path / "value")
    with pytest.raises(SystemExit, match="a value or reward model .LlamaForTokenClassification.*, no policy"):
        load_model("policy", str(tmp_path / "value"), tokenizer, ARGS, trained=True)
    file = tmp_path / "value/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": None}))
    with pytest.raises(SystemExit, match="a value or reward model .it has score.*, no policy"):
        load_model("policy", str(tmp_path / "value"), tokenizer, ARGS, trained=True)
    policy = AutoModelForCausalLM.from_config(config)
    policy.model.extra = torch.nn.Linear(2, 2)
    policy.save_pretrained(tmp_path / "extra"), tokenizer.save_pretrained(tmp_path / "extra")
    load_model("policy", str(tmp_path / "extra"), tokenizer, ARGS, trained=True)
    assert (
        "2 of its weights have no place in a policy model and are not read, model.extra.bias"
        in capsys.readouterr().out
    )
    load_model("value", reviews.folder("policy"), tokenizer, ARGS, trained=True)
    assert not capsys.readouterr().out  # a policy's output layer is what a value model does without
