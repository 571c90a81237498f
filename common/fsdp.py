"""Processes, FSDP2 sharding, the optimizer step, resume checkpoints and export.
Plain `python script.py` is world size 1 of the same path. Ranks hold the same global batch, each computes its share."""

import gc
import json
import os
import shutil
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from common.data import fail
from optional import lora

rank, world = dist.get_rank, dist.get_world_size

def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

def launch(main, args) -> None:
    """Runs `main(args)` among the processes torchrun started, or alone."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", **alone)
    torch.manual_seed(args.seed)
    try:
        mesh(args.shard_size)  # a size that does not divide stops here
        main(args)
    except Exception:  # the other ranks may wait in a collective: no tidy end, or this one would wait with them
        if world() == 1:
            raise
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    finally:
        mesh.cache_clear()
        gc.collect()  # FSDP's models must be gone before the process group, or gloo aborts at exit
        dist.destroy_process_group()

def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place."""
    dist.all_reduce(tensor)
    return tensor

def all_gather_object(value) -> list:
    out = [None] * world()
    dist.all_gather_object(out, value)
    return out

def dtypes(precision: str) -> tuple[torch.dtype, torch.dtype]:
    """(compute type, type of the master weights). `auto`: bf16 compute on a GPU, float32 on a CPU."""
    precision = ("bf16" if torch.cuda.is_available() else "fp32") if precision == "auto" else precision
    compute = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]  # fp64: for tests of equality
    return compute, max(compute, torch.float32, key=lambda t: t.itemsize)

@cache
def mesh(shard_size: int):
    """One dimension (shard over all ranks), or replicate x shard for `shard_size` ranks a replica (HSDP)."""
    size = shard_size or world()
    if world() % size:
        fail(f"--shard-size {size} does not divide the {world()} processes")
    one = int(size == world())
    return init_device_mesh(device().type, (world() // size, size)[one:], mesh_dim_names=("replicate", "shard")[one:])

def head(model):
    """The linear layer of a value or reward model, under either of transformers' names."""
    return model.score if hasattr(model, "score") else model.classifier

def shard(model, compute: torch.dtype, shard_size: int, frozen: bool) -> None:
    """FSDP2: one unit a transformer block, one for a head of another type, the rest in the root. Gradients are reduced in
    float32 (float64 for float64)."""
    full = torch.float64 if compute == torch.float64 else torch.float32
    model.frozen = frozen
    if world() == 1 and compute == full:  # nothing to shard and nothing to cast
        return
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mesh=mesh(shard_size), mp_policy=MixedPrecisionPolicy(compute, full))
    if compute != full and not model.can_generate():
        fully_shard(head(model), mesh=mesh(shard_size), mp_policy=MixedPrecisionPolicy(full, full))
    # a frozen root must reshard after forward, or it stays gathered for good
    options = dict(reshard_after_forward=True if frozen else None)
    fully_shard(model, mesh=mesh(shard_size), mp_policy=MixedPrecisionPolicy(compute, full, output_dtype=full), **options)
    if hasattr(model, "response_logprobs"):
        register_fsdp_forward_method(model, "response_logprobs")

def load_full(model, source) -> None:
    """Fills a sharded model on the meta device from rank 0's whole one."""
    model.to_empty(device=device())
    model.tie_weights()
    whole = sd.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    sd.set_model_state_dict(model, source.state_dict() if rank() == 0 else {}, options=whole)
    for name, buffer in model.named_buffers():  # rotary frequencies are in no state dict
        if rank() == 0:
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

def adamw(model, lr: float):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, fused=True)

def accumulated(micro_batches, *models):
    """The micro-batches of one optimizer step: replicas (HSDP) sum their gradients once, in the backward pass of the last."""
    for i, pick in enumerate(micro_batches, 1):
        for unit in (unit for model in models for unit in units(model)):
            unit.set_requires_all_reduce(i == len(micro_batches), recurse=False)
        yield pick

def backward(loss: torch.Tensor) -> None:
    """FSDP averages gradients over ranks; our losses have the *global* denominator, so theirs is a sum."""
    (loss * world()).backward()

def optimizer_step(model, optimizer, lr: float, loss: torch.Tensor, max_grad_norm: float, where: str) -> tuple[float, float]:
    """Clips and steps; returns (loss summed over ranks, gradient norm before clipping).
    `loss` is this rank's share. A loss or norm that is not finite stops the run before the weights change."""
    total = all_reduce(loss.detach().double().clone()).item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not (np.isfinite(total) and np.isfinite(norm)):
        fail(f"loss {total}, gradient norm {norm} at {where}: stopped before the optimizer step; the last checkpoint is whole")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm

def state_bytes(models, optimizers=()) -> int:
    """Bytes on this rank of weights, optimizer state and gradients (of the trained models: one more copy of the weights)."""
    tensors = [t for model in models for p in model.parameters() for t in [p] * (2 if p.requires_grad else 1)]
    tensors += [t for optimizer in optimizers for state in optimizer.state.values() for t in state.values()]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.nbytes for t in local if t.untyped_storage().nbytes())  # parked models have none here

def _states(trained: dict) -> dict:
    states, own = {}, sd.StateDictOptions(ignore_frozen_params=True)  # of LoRA the adapters alone
    for name, (model, optimizer) in trained.items():
        reshard(model)
        weights, moments = sd.get_state_dict(model, optimizer, options=own)
        frozen = model.all_tied_weights_keys if hasattr(model, "lora") else ()  # a tied name is one more of a frozen weight
        states[name] = {"model": {k: v for k, v in weights.items() if k not in frozen}, "optimizer": moments}
    return states

def save_checkpoint(run_dir: str, step: int, trained: dict, extra: dict, keep: int) -> None:
    """checkpoints/step-N with models, optimizers, RNG of each rank and `extra` (JSON). Written aside, then renamed.
    `trained` maps a name to (model, optimizer); the newest `keep` checkpoints stay."""
    folder = Path(run_dir, "checkpoints")
    final, part = folder / f"step-{step:06d}", folder / f"part-{step:06d}"
    if rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    dcp.save(_states(trained), checkpoint_id=part / "dcp")
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    torch.save([torch.get_rng_state(), *cuda], part / f"rng-{rank()}-of-{world()}.pt")
    dist.barrier()
    if rank() == 0:
        (part / "state.json").write_text(json.dumps({"step": step, **extra}))
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()

def load_checkpoint(run_dir: str, trained: dict) -> dict:
    """Restores the newest whole checkpoint in place and returns its `extra` with `step`; {} where there is none."""
    found = sorted(Path(run_dir, "checkpoints").glob("step-*/state.json"))
    if not found:
        return {}
    folder, states = found[-1].parent, _states(trained)
    dcp.load(states, checkpoint_id=folder / "dcp")
    for name, pair in trained.items():
        parts = dict(model_state_dict=states[name]["model"], optim_state_dict=states[name]["optimizer"])
        sd.set_state_dict(*pair, **parts, options=sd.StateDictOptions(strict=not hasattr(pair[0], "lora")))
    rng = folder / f"rng-{rank()}-of-{world()}.pt"
    if rng.exists():  # on another number of ranks there is none; only dropout (LoRA's) would draw from it
        for put, state in zip((torch.set_rng_state, torch.cuda.set_rng_state), torch.load(rng, weights_only=True), strict=False):
            put(state)
    return json.loads(found[-1].read_text())

def export(model, tokenizer, folder: str, precision: str, **config) -> None:
    """A Hugging Face folder: weights (compute type), config with the `config` entries, tokenizer, chat template."""
    reshard(model)
    full = sd.get_model_state_dict(model, options=sd.StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank() == 0:
        final, part = Path(folder), Path(folder + ".part")
        shutil.rmtree(part, ignore_errors=True)
        vars(model.config).update(config)
        model.config.dtype = compute = dtypes(precision)[0]
        tied = model.all_tied_weights_keys  # on several ranks the gathered copies share no memory, so both would be written
        full = {key: value for key, value in full.items() if key not in tied}
        if hasattr(model, "lora"):
            lora.save(model, full, part, compute)
        else:
            model.save_pretrained(part, state_dict={key: value.to(compute) for key, value in full.items()})
        tokenizer.save_pretrained(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    dist.barrier()
