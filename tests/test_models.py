"""Opening a model: its layers, its head, what is refused."""

import copy

import helpers
import pytest
import torch
from fuzz_models import expected as expected  # a fixture
from fuzz_models import test_a_damaged_model_is_right_or_one_line as test_damaged  # noqa: F401 (a part of them)
from random_models import ARGS, EOS, PAD, plain, sample_sequences
from transformers import AutoTokenizer

from common.batches import collate, run_micro_batches
from common.models import load_model
from common.tokenization import load_tokenizer, tokenize
from common.value_heads import response_values

pytestmark = pytest.mark.usefixtures("group")


def test_a_value_model_is_no_policy(folders, tokenizer):
    """Its folder has no output layer; a random one must not be put in its place."""
    with pytest.raises(SystemExit, match=r"a value or reward model \(LlamaForTokenClassification"):
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


@pytest.mark.parametrize("kind", ["value", "reward"])
def test_a_frozen_model_without_its_head_is_refused(folders, tokenizer, kind):
    """`--gvm` or `--reward` given a policy's folder must say so: a zero head would score everything 0."""
    with pytest.raises(SystemExit):
        load_model(kind, folders["policy"], tokenizer, ARGS, trained=False)


def test_tokenizer_without_a_pad_token_pads_with_eos(folders, tokenizer, tmp_path):
    """load_tokenizer gives such a tokenizer its eos for padding."""
    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    plain(folders, "policy").save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id is None
    assert load_tokenizer(str(tmp_path)).pad_token_id == EOS


@pytest.mark.parametrize("kind", ["policy", "value"])
def test_a_model_that_gives_no_numbers_later_is_named(folders, tokenizer, kind):
    """Its weights were finite when it was opened: by its folder, and by whether it is trained, as the policy and its
    reference may come from one folder."""
    model = load_model(kind, folders[kind], tokenizer, ARGS, trained=kind == "policy")
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)

    def forward(mb):
        return response_values(model, **mb) if kind == "value" else model.response_logprobs(**mb)[0]

    how = {"policy": "trained LlamaForCausalLM", "value": "frozen LlamaForTokenClassification"}[kind]
    with pytest.raises(
        SystemExit, match=f"error: {folders[kind]}: the {how} gives numbers that are not finite"
    ):
        run_micro_batches(forward, sample_sequences(), 2, PAD, 10, model=model)


def nan_value(module):
    """GVM and critic are not finite once they are open."""
    load_model = module.load_model

    def load(kind, *args, **kwargs):
        model = load_model(kind, *args, **kwargs)
        if kind == "value":
            torch.nn.init.constant_(model.score.weight, torch.nan)
        return model

    module.load_model = load


@pytest.mark.parametrize("script", ["dvpo", "ppo"])
def test_a_gvm_or_a_critic_that_gives_no_numbers_is_named_in_the_first_step(world, script):
    error = world.run(script, patch=nan_value, **helpers.ARGS[script], run_dir=f"runs/nan-{script}").error()
    assert "LlamaForTokenClassification gives numbers that are not finite" in error
    assert ("the trained" if script == "ppo" else "the frozen") in error


def test_a_token_that_the_model_has_no_embedding_of_is_a_bad_row(folders, tmp_path, capsys):
    """Gemma 3 of text alone: its tokenizer has a token for pictures that is number 262144 of 262144."""
    plain(folders, "policy").save_pretrained(tmp_path)
    own = load_tokenizer(folders["policy"])
    own.add_special_tokens({"extra_special_tokens": ["<picture>"]})
    own.save_pretrained(tmp_path)
    own = load_tokenizer(str(tmp_path))
    load_model("policy", str(tmp_path), own, ARGS, trained=True)
    rows = [{"row": i, "prompt": prompt} for i, prompt in enumerate(("dinner : the soup ?", "<picture> ?"))]
    with pytest.raises(
        SystemExit, match="error: x, row 1: it holds '<picture>', token 53, and the model has 53 e"
    ):
        tokenize(rows, own, (), 99, 9, "x")
    assert [row["row"] for row in tokenize(rows, own, (), 99, 9, "x", skip_bad_rows=True)] == [0]
    assert "dropped 1 bad rows of 2" in capsys.readouterr().out
