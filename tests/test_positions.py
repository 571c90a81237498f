"""Sequences beyond a model's positions are one line at the start; of any kind of positions the right limit."""

from pathlib import Path

import helpers
import pytest
import torch
import transformers
from families import make_policy, tiny_config
from random_models import ARGS
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from common import positions
from common.models import load_model
from common.rewards import Reward
from common.tokenization import load_tokenizer

pytestmark = pytest.mark.usefixtures("group")
TINY = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def llama(rope=None, **more):
    settings = {"rope_parameters": {"rope_theta": 1e4, **rope}} if rope else {}
    return AutoModelForCausalLM.from_config(LlamaConfig(**TINY, **settings, **more))


@pytest.mark.parametrize(
    "rope, limit",
    [
        (None, 64),
        (dict(rope_type="linear", factor=4.0), 256),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), 256),
        (dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=16), 64),  # DeepSeek's way
        (
            dict(
                rope_type="llama3",
                factor=8.0,
                original_max_position_embeddings=32,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
            256,
        ),
        (dict(rope_type="dynamic", factor=4.0), 64),
        (
            dict(
                rope_type="longrope",
                short_factor=[1.0] * 8,
                long_factor=[2.0] * 8,
                factor=4.0,
                original_max_position_embeddings=16,
            ),
            16,
        ),
    ],
)
def test_the_limit_of_rope_is_the_extended_one(rope, limit):
    assert positions.limit(llama(rope, max_position_embeddings=64))[0] == limit


def fails(model, length: int) -> bool:
    """Whether the model's own forward has no position for the last of so many tokens."""
    try:
        model(input_ids=torch.full((1, length), 5))
    except (IndexError, RuntimeError, ValueError):
        return True
    return False


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neo", "gptj", "biogpt", "ctrl", "codegen", "xglm"])
def test_tables_hold_as_many_tokens_as_the_limit_says(family):
    """The model's own forward is asked: right up to the limit, beyond it not (or it makes longer tables)."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, 64)).eval()
    limit, _ = positions.limit(model)
    assert limit == 128
    assert not fails(model, limit)
    if family not in ("biogpt", "xglm"):
        assert fails(model, limit + 1)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "bert", "electra"])
def test_encoders_hold_as_many_tokens_as_the_limit_says(family):
    """RoBERTa counts positions from after its padding token's number."""
    model = AutoModelForSequenceClassification.from_config(tiny_config(family, 64)).eval()
    limit, _ = positions.limit(model)
    assert not fails(model, limit) and fails(model, limit + 1)


@pytest.mark.parametrize("family", ["bloom", "mamba", "mamba2", "t5"])
def test_what_has_no_positions_has_no_limit(family):
    auto = transformers.AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    assert positions.limit(auto.from_config(tiny_config(family, 64)))[0] is None


def test_angles_that_depend_on_the_batch_are_why_longrope_is_limited():
    """What the refusal says of it: beside a longer text a short one gets other logits."""
    rope = dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=4.0)
    model = llama(dict(rope, original_max_position_embeddings=16), max_position_embeddings=64).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        short = model(input_ids=ids[:, :10]).logits
        longer = model(input_ids=ids).logits[:, :10]
    assert (short - longer).abs().max() > 1e-3
    with pytest.raises(SystemExit, match="17 tokens, and a llama model reads 16, as its longrope"):
        positions.check(model, "it", 17)
    positions.check(model, "it", 16)


def test_a_reward_model_is_refused_before_it_reads_too_much(tmp_path, folders, tokenizer):
    config = transformers.AutoConfig.from_pretrained(folders["reward"], max_position_embeddings=24)
    model = AutoModelForSequenceClassification.from_pretrained(folders["reward"], config=config)
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    row = {"prompt": "the food", "row": 1}
    text = "the food was good and the room was sad and the bread was cold and the chef was not great"
    with pytest.raises(SystemExit, match=f"^error: --reward {tmp_path}: sequences have up to"):
        Reward(str(tmp_path), tokenizer, ARGS, [row])([row], [([], [])], [text])


def test_load_model_reads_no_weights_of_what_is_too_short(tmp_path):
    make_policy("gpt2", tmp_path)
    Path(tmp_path, "model.safetensors").unlink()
    tokenizer = load_tokenizer(str(tmp_path))
    with pytest.raises(SystemExit, match="130 tokens, and a gpt2 model reads 128: lower --max-prompt-length"):
        load_model("policy", str(tmp_path), tokenizer, ARGS, trained=True, longest=130)


@pytest.mark.parametrize("script", [*helpers.ARGS])
def test_every_script_is_refused_in_one_line(world, script):
    """Each of them, before its first step."""
    shorter = dict(max_position_embeddings=8)
    models = {}
    for kind in ("policy", "value"):
        name = f"{kind}-of-8-tokens"
        if not world.path(f"runs/{name}").exists():
            helpers.edit_model(world, kind, name, config=lambda old: old | shorter)
        models[kind] = f"runs/{name}"
    args = helpers.ARGS[script] | dict(model=models["policy"], run_dir=f"runs/short-{script}")
    line = world.run(script, **args).error()
    assert "and a llama model reads 8" in line, line
    assert not world.path(f"runs/short-{script}/checkpoints").exists()
    if script == "dvpo":
        args = helpers.ARGS[script] | dict(gvm=models["value"], run_dir="runs/short-gvm")
        assert "and a llama model reads 8" in world.run(script, **args).error()


def test_the_longest_sequence():
    assert positions.longest_of([([1, 2], [3])], [[1, 2, 3, 4]], 5) == 9
    assert positions.longest_of([([1, 2], [3])]) == 3
    assert positions.longest_of((), [], 5) == 0
