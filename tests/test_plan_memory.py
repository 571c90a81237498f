"""tools/plan_memory.py: the plan compared with real steps of the same script, closed forms, and what must
grow or shrink."""

import contextlib

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from tools import plan_memory

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LENGTHS = ["--max-prompt-length", "24", "--max-response-length", "8", "--precision", "fp32"]
OFFLINE_FLAGS = ["--batch-size", "4", "--micro-batch-size", "2", *LENGTHS]
FLAGS = ["--mini-batch-size", "4", *OFFLINE_FLAGS]
STEP = ("rollout", "reward", "advantage", "update")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("config")
    LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plan(model):
    """Plans, each made once."""
    made = {}

    def make(algorithm, *flags, gpus=1, model=model):
        key = algorithm, flags, gpus, model
        if key not in made:
            made[key] = plan_memory.measure(algorithm, ["--model", model, *FLAGS, *flags], gpus)
        return made[key]

    return make


def parameters(head: bool) -> int:
    """Of a policy, or of a model with a head (and its bias)."""
    hidden = SIZES["hidden_size"]
    vocabulary = SIZES["vocab_size"]
    queries_and_output = 2 * hidden * hidden
    keys_and_values = 2 * hidden * hidden // 2  # of half the heads
    feed_forward = 3 * hidden * SIZES["intermediate_size"]
    norms = 2 * hidden
    layer = queries_and_output + keys_and_values + feed_forward + norms
    trunk = vocabulary * hidden + SIZES["num_hidden_layers"] * layer + hidden
    if head:
        return trunk + hidden + 1
    return trunk + vocabulary * hidden


def toy():
    # --- rollout
    x = torch.zeros(1024, 256)  # 1 MiB
    y = x + 1
    del x
    # --- update
    z = torch.cat([y, y])
    view = z.view(-1)
    view.untyped_storage().resize_(0)
    z = y * 2
    # --- log
    return z + 1


@pytest.mark.parametrize("fake", [None, FakeTensorMode(allow_non_fake_inputs=True)])
def test_the_tracker_counts_what_is_alive(fake):
    """Views once, what is freed or resized no more, phases by the banners above."""
    tracker = plan_memory.Tracker(toy, "cpu", fake, until="log")
    with tracker.watching(), contextlib.suppress(plan_memory.Enough), fake or contextlib.nullcontext():
        toy()
    assert tracker.peaks == {"rollout": 2 * 2**20, "update": 3 * 2**20}


@pytest.mark.parametrize(
    "algorithm, flags",
    [
        ("ppo", ["--precision", "bf16"]),
        ("grpo", ["--group-size", "2"]),
        ("dvpo", ["--precision", "bf16", "--offload-frozen"]),
    ],
)
def test_the_plan_is_what_a_real_step_takes(model, plan, algorithm, flags):
    """The script's main with real tensors and weights, watched by the same tracker: in bf16 through FSDP, in
    float32 without; GRPO's equal prompts are read once."""
    planned = plan(algorithm, *flags)
    real = plan_memory.measure(algorithm, ["--model", model, *FLAGS, *flags], fake=False)
    assert planned.state == real.state
    for phase in STEP:
        assert planned.phases[phase] == pytest.approx(real.phases[phase], rel=0.05), phase


@pytest.mark.parametrize("algorithm", ["kto", "gvm_td"])  # one scores within its update, one has no reference
def test_an_offline_script_is_planned_too(model, algorithm):
    flags = ["--model", model, *OFFLINE_FLAGS]
    planned = plan_memory.measure(algorithm, flags)
    real = plan_memory.measure(algorithm, flags, fake=False)
    assert planned.steps() == real.steps() == ["update"]
    assert planned.phases["update"] == pytest.approx(real.phases["update"], rel=0.01)


def test_state_has_its_closed_form(plan):
    """PPO in bf16: float32 weights, gradients and two moments of policy and critic; bf16 weights of the
    frozen models."""
    policy, critic = parameters(head=False), parameters(head=True)
    state = plan("ppo", "--precision", "bf16").state
    assert state["gradients"] == 4 * (policy + critic)
    assert state["optimizer"] == pytest.approx(8 * (policy + critic), rel=1e-3)  # and a step counter a tensor
    assert state["policy model, trained"] == 4 * policy and state["value model, trained"] == 4 * critic
    assert state["policy model, frozen"] == 2 * policy
    assert state["reward model, frozen"] == 2 * (critic - 1)  # its head has no bias


def test_eight_ranks_hold_an_eighth(plan):
    one = plan("dvpo").state
    eight = plan("dvpo", gpus=8).state
    assert one.keys() == eight.keys()
    for name in one:
        assert eight[name] == pytest.approx(one[name] / 8, rel=0.02), name  # a head of one row is on one rank
    replicas = plan("dvpo", "--shard-size", "4", gpus=8)
    assert replicas.state["gradients"] == pytest.approx(one["gradients"] / 4, rel=0.02)
    kinds = {collective.kind for collective in replicas.sent if collective.phase == "update"}
    assert kinds == {"all-gather", "reduce-scatter", "all-reduce"}


def test_what_a_rank_sends_has_its_closed_form(plan):
    """An update of one micro-batch on two ranks: half of the weights in the compute type, gathered in forward
    and (all but the root's, which stay) again in backward; half of the float32 gradients."""
    found = plan("dvpo", "--batch-size", "4", gpus=2)
    policy = parameters(head=False)
    root = 2 * SIZES["vocab_size"] * SIZES["hidden_size"] + SIZES["hidden_size"]
    epochs = found.args.epochs
    scattered = found.sent["update", "reduce-scatter", 2].size
    assert scattered == pytest.approx(epochs * 4 * policy / 2, rel=0.01)
    gathered = 2 * (policy - root) + root
    size = found.sent["update", "all-gather", 2].size
    assert size == pytest.approx(epochs * 4 * gathered / 2, rel=0.01)


def test_more_work_takes_more(plan):
    """A larger micro-batch and longer responses need more in the update, gradient checkpointing less, a
    critic more."""

    def update(*flags):
        return plan("dvpo", *flags).phases["update"]

    base = plan("dvpo")
    larger = update("--batch-size", "8", "--mini-batch-size", "8", "--micro-batch-size", "4")
    assert larger > 1.05 * base.phases["update"]
    assert update("--max-response-length", "24") > base.phases["update"]
    long = ("--max-prompt-length", "300")
    assert update(*long, "--gradient-checkpointing") < 0.9 * update(*long)
    assert plan("ppo").phases["update"] > base.phases["update"]
    frozen = base.state["policy model, frozen"] + base.state["value model, frozen"]
    assert base.phases["update"] - update("--offload-frozen") == pytest.approx(frozen, rel=0.01)
    if transformers.__version__ < "5.23":
        pytest.skip("the closed form of a rollout's memory was derived for transformers 5.23 and later")

    def rollout(tokens):
        return plan("dvpo", "--max-response-length", tokens, "--micro-batch-size", "1").phases["rollout"]

    # room for 24 + 240 - 1 tokens, and for 24 + 150 - 1, in multiples of 16
    columns = 272 - 176
    # keys and values, 2 layers, 2 heads of 32, float32, 4 responses
    assert rollout("240") - rollout("150") == 2 * 2 * 2 * 32 * 4 * 4 * columns


def test_extrapolation_in_depth(plan, monkeypatch):
    """A line through two shallow models is the peak of the deeper one."""
    sizes = SIZES | {"num_hidden_layers": 7, "tie_word_embeddings": True}

    def tiny():
        return LlamaConfig(**sizes)

    monkeypatch.setitem(plan_memory.PRESETS, "tiny", tiny)
    deep = plan("dvpo", model="tiny").phases
    found = plan_memory.line("dvpo", "tiny", (2, 4), 1, *FLAGS)
    for phase in ("reward", "update"):
        assert found[phase] == pytest.approx(deep[phase], rel=0.01), phase


def test_an_unknown_model_is_one_line(capsys):
    with pytest.raises(
        SystemExit, match="^error: Llama-9: neither a folder with a config.json nor one of Llama-3.2-1B"
    ):
        plan_memory.measure("dvpo", ["--model", "Llama-9", *FLAGS])
    with pytest.raises(SystemExit, match="^error: the planner counts our own loop"):
        plan_memory.measure("dvpo", ["--model", "Llama-3.2-1B", "--rollout-engine", "vllm", *FLAGS])


def test_presets_have_the_published_sizes():
    sizes = {
        "Llama-3.2-1B": 1.236,
        "Llama-3.2-3B": 3.213,
        "Llama-3-8B": 8.030,
        "Llama-3-70B": 70.554,
        "Qwen2.5-0.5B": 0.494,
        "Qwen2.5-7B": 7.616,
        "Qwen2.5-14B": 14.770,
        "Qwen2.5-32B": 32.764,
    }
    assert sizes.keys() == plan_memory.PRESETS.keys()
    for name, billions in sizes.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plan_memory.find_config(name))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=6e-4), name
