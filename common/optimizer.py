"""AdamW, the learning rate, gradient accumulation, and the optimizer step that refuses what is not finite."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from common import distributed, sharding
from common.cli import fail


def warmup_of(steps: int, warmup: int) -> int:
    """The steps of warm-up: at most a tenth of a run, or a short one would end before its peak."""
    return min(warmup, steps // 10)


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Rate of 0-based `step`: linear warm-up, then constant, or linear or cosine down to zero at `steps`."""
    warmup = warmup_of(steps, warmup)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * (0.5 * (1 + math.cos(math.pi * done)))
    if schedule == "constant":
        return peak
    raise KeyError(schedule)


def adamw(model, lr: float) -> torch.optim.AdamW:
    """AdamW without weight decay over the parameters that are trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)


def accumulated(micro_batches: list[list[int]], *models) -> Iterator[list[int]]:
    """The micro-batches of one optimizer step: replicas (HSDP) sum their gradients once, in the backward pass
    of the last."""
    for i, pick in enumerate(micro_batches, 1):
        is_last = i == len(micro_batches)
        for model in models:
            for unit in sharding.units(model):
                unit.set_requires_all_reduce(is_last, recurse=False)
        yield pick


def backward(loss: torch.Tensor) -> None:
    """FSDP averages gradients over ranks; our losses have the *global* denominator, so theirs is a sum."""
    (loss * distributed.world()).backward()


def optimizer_step(
    model, optimizer: torch.optim.Optimizer, lr: float, loss: torch.Tensor, max_grad_norm: float, where: str
) -> tuple[float, float]:
    """Clips and steps; returns (loss summed over ranks, gradient norm before clipping).

    `loss` is this rank's share. A loss or norm that is not finite ends the run, with a line that names
    `where`, before the weights change.
    """
    total = distributed.all_reduce(loss.detach().double().clone()).item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm.item()
    if not (np.isfinite(total) and np.isfinite(norm)):
        fail(
            f"loss {total}, gradient norm {norm} at {where}: "
            "stopped before the optimizer step; the last checkpoint is whole"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm
