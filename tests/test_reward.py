"""reward.py's loss."""

import math

import pytest
import torch

import reward


def test_bradley_terry_loss_closed_form_and_stable():
    """-log sigmoid(d) = log(1 + exp(-d)), summed; differences of +-1e4 neither overflow nor lose their
    gradient."""
    d = torch.tensor([0.0, 1.5, -2.0], dtype=torch.float64)
    expected = sum(math.log(1 + math.exp(-x)) for x in d.tolist())
    assert reward.bradley_terry_loss(d + 3, torch.full_like(d, 3.0)).item() == pytest.approx(
        expected, abs=1e-12
    )
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = reward.bradley_terry_loss(chosen, torch.zeros(2))
    loss.backward()
    assert loss.item() == 1e4 and chosen.grad.tolist() == [0.0, -1.0]
