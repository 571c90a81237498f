"""Opening a model: its layers, its head, what is refused."""

import copy

import pytest
import torch
from random_models import ARGS, EOS, PAD, plain, sample_sequences
from transformers import AutoTokenizer

from common.batches import collate
from common.models import load_model
from common.tokenization import load_tokenizer
from common.value_heads import response_values

pytestmark = pytest.mark.usefixtures("group")


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
