"""LoRA: what is trained, the reference with adapters off, exports, ranks, resume. Needs peft, which is
optional."""

import functools
import json
from types import SimpleNamespace

import helpers
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from assets import reviews
from common import lora
from common.batches import collate
from common.checkpoints import export
from common.meter import state_bytes
from common.models import load_model
from common.optimizer import adamw
from common.reference import load_reference
from common.tokenization import load_tokenizer

pytest.importorskip("peft", reason="LoRA needs peft: pip install peft")
pytestmark = pytest.mark.usefixtures("group")
LORA = dict(lora_rank=4, lora_alpha=8.0)
ARGS = SimpleNamespace(
    precision="fp32",
    shard_size=0,
    gradient_checkpointing=False,
    micro_batch_size=3,
    ref_model="",
    lora_rank=4,
    lora_alpha=8.0,
    lora_dropout=0.5,
    lora_merge=True,
)
SEQUENCES = [([1, 9, 12, 20], [30, 31, 2]), ([1, 8, 5], [33, 2]), ([1, 7, 7, 21, 22], [35, 36, 37, 38, 2])]


def missing_peft(module):
    """As where peft is not installed."""
    import sys

    sys.modules["peft"] = None


@pytest.fixture
def policy():
    """The embedded policy with adapters that do something (B starts at zero)."""
    name = reviews.folder("policy")
    torch.manual_seed(0)
    model = load_model("policy", name, load_tokenizer(name), ARGS, trained=True)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.3)
    return model


def logprobs(model):
    return model.response_logprobs(**collate(SEQUENCES, 0, "cpu"))[0].detach()


def test_adapters_start_as_nothing_and_alone_are_trained():
    """B is zero, so the policy is the base model to the bit; the optimizer holds the adapters of all linear
    layers, no more."""
    name = reviews.folder("policy")
    tokenizer = load_tokenizer(name)
    adapted = load_model("policy", name, tokenizer, ARGS, trained=True)
    base = load_model("policy", name, tokenizer, ARGS, trained=False)
    with torch.no_grad():
        assert torch.equal(logprobs(adapted), logprobs(base))
    trained = {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    layers = [key for key, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert (
        len(layers) == 2 * 7 and len(trained) == 2 * len(layers) and all(".lora_" in key for key in trained)
    )
    assert len(adamw(adapted, 1e-3).param_groups[0]["params"]) == len(trained)
    assert state_bytes([adapted]) < 1.5 * state_bytes([base])


def test_reference_is_the_policy_with_its_adapters_off(policy):
    """No second copy: the base model's log-probabilities to the bit, before, between and after forwards of
    the policy."""
    name = reviews.folder("policy")
    tokenizer = load_tokenizer(name)
    reference = load_reference(policy, name, tokenizer, ARGS, longest=0)
    assert isinstance(reference, lora.AdapterOff) and not list(reference.parameters())
    other = load_reference(
        policy, name, tokenizer, SimpleNamespace(**vars(ARGS) | dict(ref_model=name)), longest=0
    )
    with torch.no_grad():
        expected = logprobs(other)
        moved = logprobs(policy)
        assert (moved - expected).abs().max() > 0.1
        for _ in range(2):
            assert torch.equal(logprobs(reference), expected)
            assert torch.equal(logprobs(policy), moved)
    loss = policy.response_logprobs(**collate(SEQUENCES, 0, "cpu"))[0].sum()
    loss.backward()  # the adapters still get gradients after a forward without them
    gradients = [p.grad for key, p in policy.named_parameters() if "lora_A" in key]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_dropout_is_on_in_the_update_alone(policy):
    """Without gradients (rollout, old and reference log-probabilities) nothing is dropped; with them
    something is."""
    with torch.no_grad():
        assert torch.equal(logprobs(policy), logprobs(policy))
    torch.manual_seed(1)
    first, second = (policy.response_logprobs(**collate(SEQUENCES, 0, "cpu"))[0].detach() for _ in range(2))
    assert (first - second).abs().max() > 1e-3
    x = torch.ones(10_000, requires_grad=True)
    dropped = lora.Dropout(0.25)(x)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert dropped.max().item() == pytest.approx(1 / 0.75)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
def test_exports_compute_what_the_policy_does(policy, merge, tmp_path):
    """The merged folder in plain transformers, and the adapter in peft, give the trained policy's
    log-probabilities."""
    import peft

    name = reviews.folder("policy")
    policy.lora_merge = merge
    export(policy, load_tokenizer(name), str(tmp_path / "out"), "fp32")
    auto = AutoModelForCausalLM if merge else peft.AutoPeftModelForCausalLM
    opened = auto.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = logprobs(policy)
        for i, (prompt, response) in enumerate(SEQUENCES):
            logits = opened(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logits[:, 0] = -torch.inf
            expected = logits.log_softmax(-1)[range(len(response)), response]
            torch.testing.assert_close(found[i, : len(response)], expected, rtol=0, atol=2e-5)
    if merge:  # what has no adapter keeps every bit
        before, after = (load_file(f"{folder}/model.safetensors") for folder in (name, tmp_path / "out"))
        assert before.keys() == after.keys()
        same = {key for key in before if torch.equal(before[key], after[key])}
        assert same == {key for key in before if "proj" not in key}


@pytest.fixture(scope="session")  # as `world` is: pytest-xdist may leave a module and come back
def alone(world):
    @functools.cache
    def run(script):
        world.run(
            script, **helpers.ARGS[script] | LORA | dict(precision="fp64", run_dir=f"runs/lora-{script}")
        ).ok()
        return world.path(f"runs/lora-{script}")

    return run


@pytest.mark.parametrize(
    "script", ["sft", "reward", "gvm_td", "dvpo", "dro", "kto", "grpo", "remax"]
)  # ppo, rpo, dpo: below
def test_same_training_on_two_ranks(world, alone, script):
    """Losses, norms, KL, samples and merged weights: 2 ranks in small micro-batches as 1 rank in one."""
    args = (
        helpers.ARGS[script]
        | LORA
        | dict(precision="fp64", micro_batch_size=2, run_dir=f"runs/lora-{script}-2")
    )
    world.run(script, 2, **args).ok()
    helpers.assert_same(alone(script), world.path(f"runs/lora-{script}-2"), weights=1e-9)


def test_reward_model_adapter_has_its_head_and_statistics(world, tmp_path):
    """A reward model's adapter folder holds the trained head and our config entries; peft's scores are the
    merged model's."""
    import peft

    args = helpers.ARGS["reward"] | LORA | dict(precision="fp32")
    for merge in (True, False):
        world.run("reward", **args | dict(lora_merge=merge, run_dir=f"runs/judge-{merge}")).ok()
    merged, adapter = (world.path(f"runs/judge-{merge}/model") for merge in (True, False))
    config = json.loads((adapter / "model_config.json").read_text())
    assert config["score_std"] == json.loads((merged / "config.json").read_text())["score_std"]
    ids = torch.tensor([[1, 9, 12, 20, 30, 31, 2]])
    options = dict(num_labels=1, pad_token_id=0)
    with torch.no_grad():
        opened = peft.AutoPeftModelForSequenceClassification.from_pretrained(adapter, **options).eval()
        plain = AutoModelForSequenceClassification.from_pretrained(merged).eval()
        assert plain(input_ids=ids).logits.abs().item() > 1e-4
        torch.testing.assert_close(
            opened(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("script", ["dpo", "ppo"])
def test_resumed_is_unbroken(world, script):
    """2 steps, then --resume to 4: the bytes of 4 at once, dropout's random numbers too; a checkpoint holds
    adapters alone."""
    args = helpers.ARGS[script] | LORA | dict(lora_dropout=0.2, save_every=2, lr_schedule="constant")
    whole = f"runs/whole-{script}"
    parts = f"runs/parts-{script}"
    world.run(script, **args | dict(steps=4, run_dir=whole)).ok()
    world.run(script, **args | dict(steps=2, run_dir=parts)).ok()
    world.run(script, **args | dict(steps=4, run_dir=parts, resume=True)).ok()
    assert helpers.exported(world.path(parts)) == helpers.exported(world.path(whole))
    training = lambda run: [
        row for row in helpers.metrics(world.path(run)) if not any(key.startswith("eval/") for key in row)
    ]
    rows = [training(run) for run in (parts, whole)]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    reader = FileSystemReader(world.path(whole) / "checkpoints/step-000004/dcp")
    kept = [key for key in reader.read_metadata().state_dict_metadata if ".model." in key]
    assert kept and all(".lora_" in key or ".score." in key for key in kept), kept


def test_encoder_decoder(world):
    """Adapters in encoder and decoder of a T5, on 1 and 2 ranks; the reference with adapters off; a merged
    export."""
    helpers.make_t5(world.path("runs/t5lora"))
    sizes = dict(
        max_prompt_length=80,
        max_response_length=40,
        precision="fp64",
        model="runs/t5lora",
        precompute_ref=False,
    )
    for processes in (0, 2):
        world.run(
            "rpo", processes, **helpers.ARGS["rpo"] | LORA | sizes | dict(run_dir=f"runs/t5lora-{processes}")
        ).ok()
    helpers.assert_same(*(world.path(f"runs/t5lora-{processes}") for processes in (0, 2)), weights=1e-9)
    before, after = (
        load_file(world.path(f) / "model.safetensors") for f in ("runs/t5lora", "runs/t5lora-0/model")
    )
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key].double(), after[key])}
    assert changed == {
        key for key in before if "Attention." in key and "bias" not in key or "DenseReluDense" in key
    }


def test_resume_with_another_rank(world):
    """One line, not a table of sizes that do not match."""
    args = helpers.ARGS["sft"] | LORA | dict(run_dir="runs/rank", steps=1, save_every=1)
    world.run("sft", **args).ok()
    line = world.run("sft", **args | dict(lora_rank=2, resume=True)).error()
    assert "lora_rank is 2" in line and "began with 4" in line
    line = world.run("sft", **args | dict(lora_alpha=2.0, resume=True)).error()
    assert "lora_alpha is 2.0" in line and "began with 8.0" in line
    line = world.run("sft", **args | dict(model="runs/context", resume=True)).error()
    assert "model is runs/context" in line


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2)])
def test_resume_on_another_number_of_ranks(world, before, after):
    """Adapters, critic's head and both optimizers of a checkpoint of 2 ranks go on with 1, and the other way,
    as if unbroken."""
    args = helpers.ARGS["ppo"] | LORA | dict(precision="fp64", save_every=1, eval_every=0)
    if not world.path("runs/lorawhole").exists():
        world.run("ppo", **args | dict(steps=2, run_dir="runs/lorawhole")).ok()
    world.run("ppo", before, **args | dict(steps=1, run_dir=f"runs/loramoved-{before}")).ok()
    world.run("ppo", after, **args | dict(steps=2, run_dir=f"runs/loramoved-{before}", resume=True)).ok()
    helpers.assert_same(world.path(f"runs/loramoved-{before}"), world.path("runs/lorawhole"), weights=1e-9)


@pytest.mark.parametrize("script", ["ppo", "reward", "dro"])
def test_with_bf16_checkpointing_and_dropout(world, script):
    """What a GPU run has on: no crash, finite losses, adapters that moved."""
    args = (
        helpers.ARGS[script]
        | LORA
        | dict(precision="bf16", gradient_checkpointing=True, lora_dropout=0.1, steps=2)
    )
    world.run(script, **args, run_dir=f"runs/all-{script}").ok()
    rows = helpers.metrics(world.path(f"runs/all-{script}"))
    norms = [value for row in rows for key, value in row.items() if key.endswith("grad_norm")]
    assert norms and all(norm and norm > 0 for norm in norms)


def test_a_model_without_linear_layers(world):
    """GPT-2's Conv1D: one line, not peft's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = helpers.edit_model(world, "policy", "gpt2")
    ids = dict(vocab_size=len(reviews.WORDS), bos_token_id=1, eos_token_id=2, pad_token_id=0)
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **ids)).save_pretrained(
        world.path(folder)
    )
    line = world.run("sft", **helpers.ARGS["sft"] | LORA | dict(model=folder, run_dir="runs/conv")).error()
    assert "--lora-rank" in line and "torch.nn.Linear" in line


def test_without_peft(world):
    """One line with the pip command."""
    line = world.run(
        "dpo", patch=missing_peft, **helpers.ARGS["dpo"] | LORA | dict(run_dir="runs/nopeft")
    ).error()
    assert not world.path("runs/nopeft").exists()  # before the data are read, let alone scored
    assert "--lora-rank" in line and "pip install peft" in line
