"""Encoder-decoders of the T5 family: log-probabilities, rollouts, V(x), whole scripts, and what is
refused."""

import functools
from types import SimpleNamespace

import helpers
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForTokenClassification

import dro
from common.batches import collate
from common.models import load_model
from common.rollout import rollout
from common.tokenization import encode_prompt, load_tokenizer, tokenize

pytestmark = pytest.mark.usefixtures("group")
ARGS = SimpleNamespace(
    precision="fp32", shard_size=0, gradient_checkpointing=False, micro_batch_size=3, lora_rank=0
)
PROMPTS = [
    "lunch : the soup ?",
    "dinner : the waiter and the rice and the wine ?",
    "supper : the fish and the chef ?",
]
RESPONSES = ["the soup was warm .", "the waiter was not very sad .", "fine"]


@pytest.fixture(scope="module", params=[False, True], ids=["own output layer", "tied, scaled"])
def folder(request, tmp_path_factory):
    """Flan-T5's kind of output layer, and T5's, whose hidden states are scaled before it."""
    return helpers.make_t5(tmp_path_factory.mktemp("t5"), tied=request.param)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def policy(folder, tokenizer):
    return load_model("policy", folder, tokenizer, ARGS, trained=True)


@pytest.fixture(scope="module")
def sequences(tokenizer):
    rows = [{"prompt": p, "response": r} for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    return [
        (row["prompt_ids"], row["response_ids"])
        for row in tokenize(rows, tokenizer, ("response",), 99, 99, "here")
    ]


def test_the_encoder_reads_the_prompt_with_its_end_token(tokenizer):
    """As T5 was trained; a decoder-only tokenizer that appends eos loses it."""
    ids = encode_prompt(tokenizer, PROMPTS[0])
    assert ids == tokenizer(PROMPTS[0])["input_ids"] and ids[-1] == tokenizer.eos_token_id
    tokenizer.of_encoder_decoder = False
    assert encode_prompt(tokenizer, PROMPTS[0]) == ids[:-1]
    tokenizer.of_encoder_decoder = True


def test_logprobs_of_a_ragged_batch_are_plain_transformers(folder, tokenizer, policy, sequences):
    """Each response alone through transformers' own forward with labels' shift; the pad token has no
    probability."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    found, entropy = policy.response_logprobs(**collate(sequences, tokenizer.pad_token_id, "cpu"))
    for i, (prompt, response) in enumerate(sequences):
        start = torch.tensor([[model.config.decoder_start_token_id] + response[:-1]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits[0]
        logits[:, tokenizer.pad_token_id] = -torch.inf
        table = logits.log_softmax(-1)
        expected = table[range(len(response)), response]
        torch.testing.assert_close(found[i, : len(response)], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            entropy[i, : len(response)], -(table.exp() * table).nan_to_num(0.0).sum(-1), rtol=0, atol=1e-5
        )
        assert found[i, len(response) :].eq(0).all() and expected.std() > 0.1


def test_greedy_rollout_is_plain_generate(folder, tokenizer, policy, sequences):
    """The same tokens as transformers' greedy generate on each prompt alone, without the decoder's start
    token."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    prompts = [prompt for prompt, _ in sequences]
    responses = rollout(policy, tokenizer, prompts, 12, 0.0, (0, 0))[0]
    for prompt, response in zip(prompts, responses, strict=True):
        options = dict(max_new_tokens=12, do_sample=False, suppress_tokens=[tokenizer.pad_token_id])
        expected = model.generate(torch.tensor([prompt]), **options)[0, 1:].tolist()
        assert response == expected[: len(response)] and (
            len(response) == 12 or response[-1] == tokenizer.eos_token_id
        )


def test_sampling_draws_what_log_probabilities_are_of(tokenizer, policy):
    """First tokens of 3,000 samples against the probabilities of those tokens: within 5 standard errors, and
    3 of rare ones."""
    prompt = encode_prompt(tokenizer, PROMPTS[1])
    n = 3000
    first = torch.tensor([r[0] for r in rollout(policy, tokenizer, [prompt] * n, 1, 1.0, (3, 1))[0]])
    words = range(1, len(tokenizer))
    with torch.no_grad():
        logprobs, _ = policy.response_logprobs(
            **collate([(prompt, [word]) for word in words], tokenizer.pad_token_id, "cpu")
        )
    p = torch.cat([torch.zeros(1), logprobs[:, 0].exp()])
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    counts = first.bincount(minlength=len(p))
    assert counts[0] == 0 and ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 3).all()


def test_prompt_values_are_the_mean_over_the_prompts_tokens(folder, tokenizer, sequences):
    """V(x) from transformers' token classifier on each prompt alone; the response does not enter. The shared
    head too."""
    value = load_model("prompt value", folder, tokenizer, ARGS, trained=True)
    with torch.no_grad():
        value.classifier.weight.normal_(), value.classifier.bias.fill_(0.3)
    plain = AutoModelForTokenClassification.from_pretrained(
        folder, num_labels=1, classifier_dropout=0.0
    ).eval()
    plain.classifier.weight.data = value.classifier.weight.detach().clone()
    plain.classifier.bias.data = value.classifier.bias.detach().clone()
    mb = collate(sequences, tokenizer.pad_token_id, "cpu")
    found = dro.prompt_values(value, **mb)
    expected = [plain(torch.tensor([prompt])).logits.mean() for prompt, _ in sequences]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)
    policy = load_model("policy", folder, tokenizer, ARGS, trained=True)
    _, _, shared = policy.response_logprobs(**mb, prompt_head=plain.classifier)
    torch.testing.assert_close(shared, found, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone(world):
    """The run of a script on a T5 in one process, made once; returns its folder."""
    helpers.make_t5(world.path("runs/t5"))

    @functools.cache
    def run(script):
        world.run(script, **args_of(script) | dict(overwrite=True), run_dir=f"runs/t5-{script}").ok()
        return world.path(f"runs/t5-{script}")

    return run


def args_of(script):
    sizes = dict(max_prompt_length=80, max_response_length=40, precision="fp64", model="runs/t5", steps=2)
    # this model is so sure that a sample is the greedy answer
    hot = dict(temperature=5.0) if script in helpers.ONLINE else {}
    return (
        helpers.ARGS[script]
        | sizes
        | hot
        | (dict(precompute_ref=False) if script in ("rpo", "dro", "kto", "dpo") else {})
    )


@pytest.mark.parametrize("script", ["sft", "rpo", "dro", "kto", "dpo", "grpo", "remax"])
def test_same_training_on_two_ranks(world, alone, script):
    """Losses, gradient norms, KL, samples and weights do not depend on ranks or micro-batches; the export
    opens as it is."""
    world.run(script, 2, **args_of(script) | dict(micro_batch_size=2, run_dir=f"runs/t5-{script}-2")).ok()
    helpers.assert_same(alone(script), world.path(f"runs/t5-{script}-2"))
    before = AutoModelForSeq2SeqLM.from_pretrained(world.path("runs/t5")).state_dict()
    after, info = AutoModelForSeq2SeqLM.from_pretrained(alone(script) / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    changed = [
        (tensor != before[key]).any().item()
        for key, tensor in after.state_dict().items()
        if "layer_norm" not in key
    ]
    assert all(changed)


def test_reference_and_policy_agree_in_bf16(world, alone):
    """T5's position bias is a mask that has a gradient in the policy and none in the reference: the same
    kernel all the same, so the log-ratio of the first step, from identical models, is 0."""
    alone("sft")
    world.run("rpo", **args_of("rpo") | dict(precision="bf16", steps=1, run_dir="runs/t5-bf16")).ok()
    (row,) = (row for row in helpers.metrics(world.path("runs/t5-bf16")) if "rpo/log_ratio" in row)
    assert abs(row["rpo/log_ratio"]) < 1e-3  # of sums of hundreds of nats; with the fused kernel it is 0.5


def test_shared_encoder_trains_on_two_ranks(world, alone):
    """DRO's V as a layer on the policy's encoder: the same on 2 ranks."""
    alone("dro")
    for processes in (0, 2):
        world.run(
            "dro",
            processes,
            **args_of("dro") | dict(shared_encoder=True, run_dir=f"runs/t5-shared-{processes}"),
        ).ok()
    helpers.assert_same(*(world.path(f"runs/t5-shared-{processes}") for processes in (0, 2)))


@pytest.mark.parametrize("script", ["ppo", "gvm_td", "reward"])
def test_value_and_reward_models_refuse_it(world, alone, script):
    """A bidirectional encoder would see the tokens it is to judge: one line says so."""
    alone("sft")
    line = world.run(
        script, **helpers.ARGS[script] | dict(model="runs/t5", max_prompt_length=80, run_dir="runs/t5-no")
    ).error()
    assert "runs/t5" in line and "encoder-decoder" in line


def test_other_encoder_decoders_are_refused(world):
    """BART's absolute positions would need another padding."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    helpers.make_t5(world.path("runs/bart"))
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=99, encoder_attention_heads=2, decoder_attention_heads=2, **sizes)
    )
    model.save_pretrained(world.path("runs/bart"))
    line = world.run(
        "sft", **helpers.ARGS["sft"] | dict(model="runs/bart", max_prompt_length=80, run_dir="runs/t5-bart")
    ).error()
    assert "T5 family" in line and "bart" in line
