"""FSDP2: a model over the ranks, whole again for a rollout.

Each wrapped module is a unit whose weights are gathered and freed together."""

from collections.abc import Iterable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as sd
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from common import distributed, value_heads


def shard(model, compute: torch.dtype, shard_size: int, frozen: bool) -> None:
    """FSDP2, in place: one unit per transformer block, one for a head of another type, the rest in the root.

    Forward and backward compute in `compute`; gradients are reduced in float32 (float64 for float64).
    `shard_size`: over how many ranks a replica lies (0: all).
    """
    full = torch.float64 if compute == torch.float64 else torch.float32
    model.frozen = frozen
    if distributed.world() == 1 and compute == full:  # nothing to shard and nothing to cast
        return
    mesh = distributed.mesh(shard_size)
    blocks = model._no_split_modules or ()  # transformers' names for the classes of its blocks
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(compute, full))
    if compute != full and not model.can_generate():  # a value's head computes in full precision
        head = value_heads.head(model)
        fully_shard(head, mesh=mesh, mp_policy=MixedPrecisionPolicy(full, full))
    policy = MixedPrecisionPolicy(compute, full, output_dtype=full)
    # None: the root of a trained model stays gathered until its backward. A frozen one has none, and would
    # stay for good.
    reshard_after_forward = True if frozen else None
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    if hasattr(model, "response_logprobs"):
        register_fsdp_forward_method(model, "response_logprobs")


def load_full(model, source) -> None:
    """Fills a sharded model on the meta device from rank 0's whole one; `source` is None on the others."""
    model.to_empty(device=distributed.device())
    model.tie_weights()
    options = sd.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    weights = source.state_dict() if distributed.rank() == 0 else {}
    sd.set_model_state_dict(model, weights, options=options)
    for name, buffer in model.named_buffers():  # rotary frequencies are in no state dict
        if distributed.rank() == 0:
            buffer.copy_(source.get_buffer(name))
        dist.broadcast(buffer, 0)


def in_type(compute: torch.dtype, model, weights: Iterable[tuple[str, torch.Tensor]]) -> dict:
    """A state dict for an export: parameters in `compute`, as forward passes used them; buffers (a router's
    float32 bias, integers) in the type that forward passes read them in."""
    buffers = {name for name, _ in model.named_buffers()}
    return {name: tensor if name in buffers else tensor.to(compute) for name, tensor in weights}


@contextmanager
def gathered(model):
    """Every parameter stays gathered inside: one all-gather per rollout, not per token; no rank waits."""
    for unit in units(model):
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units(model):  # as `shard` has set it
            unit.set_reshard_after_forward(unit is not model or model.frozen, recurse=False)
        reshard(model)


def units(model) -> list[FSDPModule]:
    """The wrapped modules; none in a process alone that computes in the type of its weights."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model) -> None:
    """Frees what is gathered: after a forward without gradient the root's parameters still are."""
    for unit in units(model):
        unit.reshard()
