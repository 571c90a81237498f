"""Decoding by value: candidates side by side are what full forward passes say; tokens, KL and choices are those of
the formulas; families whose cache cannot hold candidates are refused."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from random_models import EOS, PAD, plain, sample_sequences
from test_rollout import FAMILIES, IDS, VOCABULARY, tiny

from common import decoding
from common.decoding import (
    Guide,
    best_of,
    best_of_kl,
    check_guide,
    decode_guided,
    guided,
    reweighted,
    step_kl,
)
from common.models import class_to_open, load_model
from common.rollout import decode, rollout, sample

pytestmark = pytest.mark.usefixtures("group")
ARGS = SimpleNamespace(precision="fp64", shard_size=0, gradient_checkpointing=False, lora_rank=0)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [5, 6, 7]]


def tiny_value(family, dtype=torch.float64, **more):
    """A random value model of a family, with weights so large that every argument matters."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=VOCABULARY, **IDS, **FAMILIES[family] | more, num_labels=1, classifier_dropout=0.0
    )
    model = class_to_open(config, "value", family).from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.compute_dtype = dtype
    return model


@torch.no_grad()
def full_q(gvm, prompt, response):
    """Q of the last token, by one forward pass without a cache."""
    return gvm(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, -1, 0]


@torch.no_grad()
def brute_force(policy, gvm, prompt, uniforms, k, beta, temperature, stop):
    """A response by full forward passes of one sequence at a time: (tokens, log pi, Q, KL)."""
    response = []
    logprobs = []
    values = []
    kl = 0.0
    for uniform in uniforms:
        logits = policy(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, -1].double()
        if policy.forbidden_tokens is not None:
            logits[policy.forbidden_tokens] = -math.inf
        heat = temperature or 1.0
        log_pi = (logits / heat).log_softmax(0)
        best = log_pi.argsort(descending=True)[:k].sort().values  # in the vocabulary's order
        q = torch.stack([full_q(gvm, prompt, [*response, token]) for token in best.tolist()]).double()
        p = ((logits[best] + q / beta) / heat).softmax(0)
        place = int(torch.searchsorted(p.cumsum(0), uniform, right=True))
        if temperature == 0:
            place = int(p.argmax())
            kl -= log_pi[best[place]].item()
        else:
            kl += (p * (p.log() - log_pi[best])).nansum().item()
        token = best[place].item()
        response.append(token)
        logprobs.append(log_pi[token].item())
        values.append(q[place].item())
        if token == stop:
            break
    return response, logprobs, values, kl


# --- candidates and tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox", "opt"])
def test_guided_tokens_are_those_of_full_forward_passes(family, temperature):
    """In float64, of prompts of other lengths, one of them twice; responses end at other steps; rotary and
    learned positions."""
    policy = tiny(family).double()
    policy.forbidden_tokens = torch.tensor([0, 3])
    gvm = tiny_value(family)
    uniforms = torch.rand(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    lengths = set()
    for stop in (-1, 30, 12):  # none, and two words
        with torch.no_grad():
            found = decode_guided(
                policy, Guide(gvm, 5, 0.8, False), PROMPTS, uniforms, temperature, [stop], 0
            )
        for prompt, row, (tokens, logprobs, values, kl) in zip(PROMPTS, uniforms, found, strict=True):
            expected = brute_force(policy, gvm, prompt, row, 5, 0.8, temperature, stop)
            assert tokens == expected[0]
            assert logprobs == pytest.approx(expected[1], abs=1e-9)
            assert values == pytest.approx(expected[2], abs=1e-9)
            assert kl == pytest.approx(expected[3], abs=1e-9)
            lengths.add(len(tokens))
    assert 9 in lengths


def test_without_reweighting_it_samples_as_before():
    """beta infinite: with all tokens as candidates what `decode` draws by the same numbers, with k of them
    what `sample` draws of the k likeliest."""
    policy = tiny("llama").double()
    gvm = tiny_value("llama")
    uniforms = torch.rand(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for temperature in (1.0, 0.6, 0.0):
            heats = torch.full((4,), temperature, dtype=torch.float64)
            plain_responses = decode(policy, PROMPTS, uniforms, heats, [30], 0)
            found = decode_guided(
                policy, Guide(gvm, 10_000, math.inf, False), PROMPTS, uniforms, temperature, [30], 0
            )
            assert [each[0] for each in found] == [each[0] for each in plain_responses]
            if temperature:
                assert [each[3] for each in found] == pytest.approx([0.0] * 4, abs=1e-9)

        found = decode_guided(policy, Guide(gvm, 3, math.inf, False), PROMPTS, uniforms, 1.0, [-1], 0)
        for prompt, row, (tokens, _, _, kl) in zip(PROMPTS, uniforms, found, strict=True):
            mass = 0.0
            for t, token in enumerate(tokens):
                logits = policy(input_ids=torch.tensor([prompt + tokens[:t]]), use_cache=False).logits[:, -1]
                top = logits.topk(3)
                cut = torch.full_like(logits, -math.inf).scatter(1, top.indices, top.values)
                drawn, _ = sample(cut, row[t : t + 1], torch.ones(1, dtype=torch.float64), None)
                assert drawn.item() == token
                mass += (logits.softmax(-1).gather(1, top.indices).sum()).log().item()
            assert kl == pytest.approx(-mass, abs=1e-9)  # what was cut off


def test_a_small_beta_takes_the_candidate_of_the_highest_value():
    policy = tiny("llama").double()
    gvm = tiny_value("llama")
    uniforms = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = decode_guided(policy, Guide(gvm, 4, 1e-9, False), PROMPTS, uniforms, 1.0, [-1], 0)
        changed = 0
        for prompt, (tokens, _, values, _) in zip(PROMPTS, found, strict=True):
            for t, token in enumerate(tokens):
                logits = policy(input_ids=torch.tensor([prompt + tokens[:t]]), use_cache=False).logits[0, -1]
                candidates = logits.topk(4).indices.tolist()
                q = [full_q(gvm, prompt, [*tokens[:t], each]).item() for each in candidates]
                assert token == candidates[q.index(max(q))]
                assert values[t] == pytest.approx(max(q), abs=1e-9)
                changed += token != candidates[0]
    assert changed > 5


def test_log_odds():
    """atanh of the clamped value re-weights; the record keeps the value."""
    policy = tiny("llama").double()
    gvm = tiny_value("llama")
    with torch.no_grad():
        gvm.score.weight.mul_(0.8)
    uniforms = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    class Transformed(torch.nn.Module):
        config = gvm.config
        compute_dtype = gvm.compute_dtype

        def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None):
            out = gvm(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=True,
            )
            return SimpleNamespace(logits=torch.atanh(out.logits.clamp(-0.99, 0.99)))

    with torch.no_grad():
        found = decode_guided(policy, Guide(gvm, 5, 0.5, True), PROMPTS, uniforms, 1.0, [-1], 0)
        expected = decode_guided(policy, Guide(Transformed(), 5, 0.5, False), PROMPTS, uniforms, 1.0, [-1], 0)
        other = decode_guided(policy, Guide(gvm, 5, 0.5, False), PROMPTS, uniforms, 1.0, [-1], 0)
    assert [each[0] for each in found] == [each[0] for each in expected]
    assert [each[0] for each in found] != [each[0] for each in other]
    values = torch.tensor([each[2] for each in found])
    assert values.clamp(-0.99, 0.99).atanh().flatten().tolist() == pytest.approx(
        torch.tensor([each[2] for each in expected]).flatten().tolist()
    )


# --- KL -----------------------------------------------------------------------------------------------------


def test_kl_of_a_step():
    """By the definition over all tokens; a forbidden token has no part in it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    logits[:, 4] = -math.inf
    candidates = logits.topk(5).indices
    values = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    scores = reweighted(logits, candidates, values, 0.5)
    for temperature in (1.0, 0.5):
        pi = (logits / temperature).softmax(-1)
        p = torch.zeros_like(pi).scatter(
            1, candidates, ((logits.gather(1, candidates) + values / 0.5) / temperature).softmax(-1)
        )
        for i in range(6):
            expected = sum(p[i, a] * (p[i, a] / pi[i, a]).log() for a in candidates[i].tolist())
            assert step_kl(scores, logits, temperature)[i] == pytest.approx(expected.item())
    greedy = step_kl(scores, logits, 0.0)
    assert greedy.tolist() == pytest.approx(
        (-logits.softmax(-1).gather(1, scores.argmax(1, keepdim=True)).log()).squeeze(1).tolist()
    )


def test_kl_of_best_of_n_is_below_its_bound():
    """Of 40 responses of unequal probability and distinct values, exactly; of many equal ones it is nearly
    reached."""
    assert best_of_kl(1) == 0
    for p, slack in ((torch.linspace(1, 5, 40), 0.2), (torch.ones(20_000), 1e-3)):
        p = p.double() / p.sum()
        below = p.cumsum(0)
        for n in (2, 4, 16):
            best = below**n - (below - p) ** n
            kl = (best * (best / p).log()).nansum().item()
            assert kl <= best_of_kl(n) + 1e-9
            assert best_of_kl(n) - kl < slack * n


# --- which models can guide ---------------------------------------------------------------------------------

NOT_SIDE_BY_SIDE = {"mistral", "gemma3_text", "gpt_neo", "bloom", "mpt", "falcon"}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_a_family_guides_rightly_or_is_refused(family, tokenizer):
    """Not those with sliding windows or ALiBi, nor Falcon, whose value model takes no positions; one line says so."""
    gvm = tiny_value(family, torch.float32)
    if family not in NOT_SIDE_BY_SIDE:
        check_guide(gvm, "x", tokenizer)
        return
    with pytest.raises(SystemExit, match="--gvm x.*--decode best-of needs no cache|side by side") as error:
        check_guide(gvm, "x", tokenizer)
    assert "\n" not in str(error.value)


FAULTS = {
    "candidates see each other": ("candidate_mask", lambda real: lambda m, k, d: real(m, k, d).clamp(min=0)),
    "candidates stand behind each other": (
        "candidate_values",
        lambda real: lambda gvm, c, m, cache: real(gvm, c, torch.cat([m, m[:, :1] * 0 + 1], 1)[:, 1:], cache),
    ),
    "another candidate is kept": (
        "keep_candidate",
        lambda real: lambda cache, count, choice: real(cache, count, (choice + 1) % count),
    ),
    "padding is seen": ("candidate_mask", lambda real: lambda m, k, d: real(torch.ones_like(m), k, d)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_cache_is_found(fault, tokenizer, monkeypatch):
    """Both when the GVM is opened and in what was decoded."""
    name, make = FAULTS[fault]
    monkeypatch.setattr(decoding, name, make(getattr(decoding, name)))
    with pytest.raises(SystemExit, match="of their spread off"):
        check_guide(tiny_value("llama", torch.float32), "x", tokenizer)


# --- all prompts --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(folders, tokenizer):
    """Policy and value model in float64."""
    policy = load_model("policy", folders["policy"], tokenizer, ARGS, trained=False)
    return policy, load_model("value", folders["value"], tokenizer, ARGS, trained=False)


def test_guided_on_all_prompts(folders, tokenizer, models):
    """The same tokens as by full forward passes of plain transformers; without pad."""
    policy, gvm = models
    prompts = [prompt for prompt, _ in sample_sequences(seed=5)]
    found = guided(policy, Guide(gvm, 6, 0.5, False), tokenizer, prompts, 8, 1.0, (0, 1))
    reference = plain(folders, "policy").double()
    reference.forbidden_tokens = torch.tensor([PAD])
    value = plain(folders, "value").double()
    for i, (prompt, decoded) in enumerate(zip(prompts, found, strict=True)):
        numbers = decoding.uniform_numbers(decoding.seeds_of((0, 1), [i]), 8, "cpu")[0]
        tokens, _, values, kl = brute_force(reference, value, prompt, numbers, 6, 0.5, 1.0, EOS)
        assert decoded.tokens == tokens
        assert decoded.value == pytest.approx(values[-1], abs=1e-6)
        assert decoded.kl == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("what", ["policy", "value"])
def test_guided_compares_with_full_forward_passes(tokenizer, models, monkeypatch, what):
    """Whatever the check at the start did not see ends the run."""
    policy, gvm = models
    real = decoding.decode_guided

    def wrong(*args):
        found = []
        for tokens, logprobs, values, kl in real(*args):
            if what == "policy":
                logprobs = [each - 0.1 for each in logprobs]
            else:
                values = [each + 0.1 for each in values]
            found.append((tokens, logprobs, values, kl))
        return found

    monkeypatch.setattr(decoding, "decode_guided", wrong)
    prompts = [prompt for prompt, _ in sample_sequences(seed=5)]
    words = "log-probabilities are 0.1" if what == "policy" else "of their spread off"
    with pytest.raises(SystemExit, match=words):
        guided(policy, Guide(gvm, 6, 0.5, False), tokenizer, prompts, 8, 1.0, (0, 1))


def test_guided_refuses_an_encoder_decoder(tokenizer, models):
    t5 = SimpleNamespace(config=SimpleNamespace(model_type="t5", is_encoder_decoder=True))
    with pytest.raises(SystemExit, match="t5 policy is an encoder-decoder; --decode best-of"):
        guided(t5, Guide(models[1], 6, 0.5, False), tokenizer, [[5]], 8, 1.0, (0, 1))


def test_best_of(folders, tokenizer, models):
    """One of one is plain sampling; of n it is the one whose last Q, by a full forward pass, is highest; more
    are never worse."""
    policy, gvm = models
    prompts = [prompt for prompt, _ in sample_sequences(seed=5)]
    one = best_of(policy, gvm, tokenizer, prompts, 1, 8, 1.0, (0, 1), 3)
    assert [each.tokens for each in one] == rollout(policy, tokenizer, prompts, 8, 1.0, (0, 1))[0]
    assert [each.kl for each in one] == [0.0] * len(prompts)
    value = plain(folders, "value").double()
    before = one
    for n in (3, 7):
        responses, _ = rollout(policy, tokenizer, prompts * n, 8, 1.0, (0, 1))
        found = best_of(policy, gvm, tokenizer, prompts, n, 8, 1.0, (0, 1), 3)
        for i, prompt in enumerate(prompts):
            mine = responses[i :: len(prompts)]
            q = [full_q(value, prompt, response).item() for response in mine]
            assert found[i].tokens == mine[q.index(max(q))]
            assert found[i].value == pytest.approx(max(q), abs=1e-6)
            assert found[i].kl == best_of_kl(n)
            assert found[i].value >= before[i].value - 1e-6
        before = found
