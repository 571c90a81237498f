"""The optimizer step that refuses what is not finite."""

import math

import pytest
import torch
from random_models import ARGS, PAD, sample_sequences

from common.batches import collate
from common.models import load_model
from common.optimizer import adamw, backward, optimizer_step

pytestmark = pytest.mark.usefixtures("group")


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(folders, tokenizer):
    """NaN in the loss or in a gradient: SystemExit of one line that says where, weights as they were."""
    model = load_model("policy", folders["policy"], tokenizer, ARGS, trained=True)
    optimizer = adamw(model, 0.0)
    before = [p.clone() for p in model.parameters()]
    loss = model.response_logprobs(**collate(sample_sequences(), PAD, "cpu"))[0].sum()
    backward(loss)
    with pytest.raises(SystemExit, match="step 7, data rows .3."):
        optimizer_step(model, optimizer, 1e-2, loss.detach() * math.nan, 1.0, "step 7, data rows [3]")
    model.lm_head.weight.grad[0, 0] = math.inf
    with pytest.raises(SystemExit, match="gradient norm"):
        optimizer_step(model, optimizer, 1e-2, loss.detach(), 1.0, "")
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
