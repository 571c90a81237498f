"""FSDP2: a model over the ranks, whole again for a rollout.

Each wrapped module is a unit whose weights are gathered and freed together."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as sd
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from common import distributed, value_heads


def shard(model, compute: torch.dtype, shard_size: int, frozen: bool) -> None:
    """FSDP2: one unit a transformer block, one for a head of another type, the rest in the root. Gradients are reduced in
    float32 (float64 for float64)."""
    full = torch.float64 if compute == torch.float64 else torch.float32
    model.frozen = frozen
    if distributed.world() == 1 and compute == full:  # nothing to shard and nothing to cast
        return
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(
                module, mesh=distributed.mesh(shard_size), mp_policy=MixedPrecisionPolicy(compute, full)
            )
    if compute != full and not model.can_generate():
        fully_shard(
            value_heads.head(model),
            mesh=distributed.mesh(shard_size),
            mp_policy=MixedPrecisionPolicy(full, full),
        )
    # a frozen root must reshard after forward, or it stays gathered for good
    options = dict(reshard_after_forward=True if frozen else None)
    policy = MixedPrecisionPolicy(compute, full, output_dtype=full)
    fully_shard(model, mesh=distributed.mesh(shard_size), mp_policy=policy, **options)
    if hasattr(model, "response_logprobs"):
        register_fsdp_forward_method(model, "response_logprobs")


def load_full(model, source) -> None:
    """Fills a sharded model on the meta device from rank 0's whole one."""
    model.to_empty(device=distributed.device())
    model.tie_weights()
    whole = sd.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    sd.set_model_state_dict(model, source.state_dict() if distributed.rank() == 0 else {}, options=whole)
    for name, buffer in model.named_buffers():  # rotary frequencies are in no state dict
        if distributed.rank() == 0:
            buffer.copy_(source.get_buffer(name))
        dist.broadcast(buffer, 0)


@contextmanager
def gathered(model):
    """Every parameter stays gathered inside: one all-gather a rollout, not one a token, and no rank waits for another."""
    for unit in units(model):
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units(model):
            unit.set_reshard_after_forward(unit is not model or model.frozen, recurse=False)
        reshard(model)


def units(model) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model) -> None:
    for unit in units(model):  # after a forward without gradient the root's parameters are still gathered
        unit.reshard()
