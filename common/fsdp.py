"""Processes, FSDP2 sharding, the optimizer step, resume checkpoints and export.

Plain `python script.py` is world size 1 of the same code path. Ranks hold the same global batch, so that denominators and
statistics over it need no communication; each computes its share.
"""

import gc
import json
import os
import random
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from common.data import fail

_mesh = {}


def rank() -> int:
    return dist.get_rank()


def world() -> int:
    return dist.get_world_size()


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def launch(main, args) -> None:
    """Runs `main(args)` among the processes torchrun started, or alone."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    try:
        main(args)
    except SystemExit:
        raise
    except BaseException:  # the other ranks may wait in a collective: no tidy end, or this one would wait with them
        if world() == 1:
            raise
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)
    finally:
        _mesh.clear()
        gc.collect()  # FSDP's models must be gone before the process group, or gloo aborts at exit
        dist.destroy_process_group()


@contextmanager
def rank_zero_first():
    """The body runs on rank 0, then on the others."""
    if rank() != 0:
        dist.barrier()
    yield
    if rank() == 0:
        dist.barrier()


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor


def all_gather_object(value) -> list:
    out = [None] * world()
    dist.all_gather_object(out, value)
    return out


# --- sharding --------------------------------------------------------------------------------------------------------


def dtypes(precision: str) -> tuple[torch.dtype, torch.dtype]:
    """(compute type, type of the master weights). `auto`: bf16 compute on a GPU, float32 on a CPU."""
    if precision == "fp64":  # for tests of equality
        return torch.float64, torch.float64
    bf16 = precision == "bf16" or (precision == "auto" and torch.cuda.is_available())
    return (torch.bfloat16 if bf16 else torch.float32), torch.float32


def mesh(shard_size: int):
    """One dimension (shard over all ranks), or replicate x shard for `shard_size` ranks a replica (HSDP)."""
    size = shard_size or world()
    if world() % size:
        fail(f"--shard-size {size} does not divide the {world()} processes")
    if size not in _mesh:
        shape, names = ((world(),), ("shard",)) if size == world() else ((world() // size, size), ("replicate", "shard"))
        _mesh[size] = init_device_mesh(device().type, shape, mesh_dim_names=names)
    return _mesh[size]


def shard(model, compute: torch.dtype, shard_size: int, frozen: bool) -> None:
    """FSDP2: one unit a transformer block, the rest in the root. Reduction in float32 (float64 for float64)."""
    reduce = torch.float64 if compute == torch.float64 else torch.float32
    policy = dict(param_dtype=compute, reduce_dtype=reduce)
    names = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh(shard_size), mp_policy=MixedPrecisionPolicy(**policy))
    for head in ("score", "classifier"):
        if compute == torch.bfloat16 and getattr(model, head, None) is not None:
            full = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=reduce)
            fully_shard(getattr(model, head), mesh=mesh(shard_size), mp_policy=full)
    # a frozen root must reshard after forward, or it stays gathered for good
    output = MixedPrecisionPolicy(**policy, output_dtype=reduce)
    fully_shard(model, mesh=mesh(shard_size), mp_policy=output, reshard_after_forward=True if frozen else None)
    model.frozen = frozen
    for method in ("generate", "response_logprobs"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def load_full(model, source) -> None:
    """Fills a sharded model on the meta device from rank 0's whole one."""
    model.to_empty(device=device())
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, source.state_dict() if rank() == 0 else {}, options=options)
    for name, buffer in model.named_buffers():  # rotary frequencies are in no state dict
        if rank() == 0:
            buffer.copy_(source.get_buffer(name))
        dist.broadcast(buffer, 0)


@contextmanager
def gathered(model):
    """Every parameter stays gathered inside: one all-gather a rollout, not one a token, and no rank waits for another."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model or model.frozen, recurse=False)
            module.reshard()


# --- the optimizer step ----------------------------------------------------------------------------------------------


def adamw(model, lr: float, weight_decay: float = 0.0):
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay, fused=torch.cuda.is_available()
    )


def backward(loss: torch.Tensor) -> None:
    """FSDP averages gradients over ranks; our losses have the *global* denominator, so theirs is a sum."""
    (loss * world()).backward()


def optimizer_step(model, optimizer, lr: float, loss: torch.Tensor, max_grad_norm: float, where: str) -> tuple[float, float]:
    """Clips and steps; returns (loss summed over ranks, gradient norm before clipping).

    `loss` is this rank's share. A loss or norm that is not finite stops the run before the weights change.
    """
    total = all_reduce(loss.detach().clone().double()).item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not (np.isfinite(total) and np.isfinite(norm)):
        fail(f"loss {total}, gradient norm {norm} at {where}: stopped before the weights changed; the last checkpoint is whole")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Rate of 0-based `step`: linear warm-up, then constant, or linear or cosine down to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + np.cos(np.pi * done))}[schedule]


def state_bytes(models, optimizers=()) -> int:
    """Bytes on this rank of weights, optimizer state and gradients (of the trained models: one more copy of the weights)."""

    def size(tensor):
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return local.numel() * local.element_size()

    total = sum(size(p) * (2 if p.requires_grad else 1) for model in models for p in model.parameters())
    return total + sum(size(s) for o in optimizers for st in o.state.values() for s in st.values() if torch.is_tensor(s))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(run_dir: str, step: int, trained: dict, extra: dict, keep: int) -> None:
    """checkpoints/step-N with models, optimizers, RNG of each rank and `extra` (JSON). Written aside, then renamed."""
    folder = Path(run_dir, "checkpoints")
    final, part = folder / f"step-{step:06d}", folder / f"part-{step:06d}"
    if rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    dcp.save(_states(trained), checkpoint_id=part / "dcp")
    rng = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    torch.save(rng, part / f"rng-{rank()}-of-{world()}.pt")
    dist.barrier()
    if rank() == 0:
        (part / "state.json").write_text(json.dumps({"step": step, **extra}))
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(run_dir: str, trained: dict) -> dict:
    """Restores the newest whole checkpoint in place and returns its `extra` with `step`; {} where there is none."""
    folders = sorted(Path(run_dir, "checkpoints").glob("step-*/state.json"))
    if not folders:
        return {}
    folder = folders[-1].parent
    states = _states(trained)
    dcp.load(states, checkpoint_id=folder / "dcp")
    for name, (model, optimizer) in trained.items():
        part = states[name]
        set_state_dict(model, optimizer, model_state_dict=part["model"], optim_state_dict=part["optimizer"])
    rng = folder / f"rng-{rank()}-of-{world()}.pt"
    if rng.exists():
        state = torch.load(rng, weights_only=True)
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    return json.loads((folder / "state.json").read_text())


def _states(trained: dict) -> dict:
    out = {}
    for name, (model, optimizer) in trained.items():
        reshard(model)
        out[name] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    return out


def reshard(model) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def export(model, tokenizer, folder: str, precision: str, **config) -> None:
    """A Hugging Face folder: weights (compute type), config with the `config` entries, tokenizer, chat template."""
    reshard(model)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank() == 0:
        compute, _ = dtypes(precision)
        final, part = Path(folder), Path(folder + ".part")
        shutil.rmtree(part, ignore_errors=True)
        vars(model.config).update(config)
        model.config.dtype = compute
        model.save_pretrained(part, state_dict={k: v.to(compute) for k, v in full.items()})
        tokenizer.save_pretrained(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    dist.barrier()
