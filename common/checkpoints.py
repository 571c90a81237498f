"""Checkpoints to resume from, and the export that others open."""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sd

from common import distributed, lora, sharding


def _states(trained: dict) -> dict:
    states, own = {}, sd.StateDictOptions(ignore_frozen_params=True)  # of LoRA the adapters alone
    for name, (model, optimizer) in trained.items():
        sharding.reshard(model)
        weights, moments = sd.get_state_dict(model, optimizer, options=own)
        frozen = (
            model.all_tied_weights_keys if hasattr(model, "lora") else ()
        )  # a tied name is one more of a frozen weight
        states[name] = {"model": {k: v for k, v in weights.items() if k not in frozen}, "optimizer": moments}
    return states


def save_checkpoint(run_dir: str, step: int, trained: dict, extra: dict, keep: int) -> None:
    """checkpoints/step-N with models, optimizers, RNG of each rank and `extra` (JSON). Written aside, then renamed.
    `trained` maps a name to (model, optimizer); the newest `keep` checkpoints stay."""
    folder = Path(run_dir, "checkpoints")
    final, part = folder / f"step-{step:06d}", folder / f"part-{step:06d}"
    if distributed.rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    dcp.save(_states(trained), checkpoint_id=part / "dcp")
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    torch.save([torch.get_rng_state(), *cuda], part / f"rng-{distributed.rank()}-of-{distributed.world()}.pt")
    dist.barrier()
    if distributed.rank() == 0:
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
    rng = folder / f"rng-{distributed.rank()}-of-{distributed.world()}.pt"
    if rng.exists():  # on another number of ranks there is none; only dropout (LoRA's) would draw from it
        for put, state in zip(
            (torch.set_rng_state, torch.cuda.set_rng_state), torch.load(rng, weights_only=True), strict=False
        ):
            put(state)
    return json.loads(found[-1].read_text())


def export(model, tokenizer, folder: str, precision: str, **config) -> None:
    """A Hugging Face folder: weights (compute type), config with the `config` entries, tokenizer, chat template."""
    sharding.reshard(model)
    full = sd.get_model_state_dict(model, options=sd.StateDictOptions(full_state_dict=True, cpu_offload=True))
    if distributed.rank() == 0:
        final, part = Path(folder), Path(folder + ".part")
        shutil.rmtree(part, ignore_errors=True)
        vars(model.config).update(config)
        model.config.dtype = compute = distributed.dtypes(precision)[0]
        tied = (
            model.all_tied_weights_keys
        )  # on several ranks the gathered copies share no memory, so both would be written
        full = {key: value for key, value in full.items() if key not in tied}
        if hasattr(model, "lora"):
            lora.save(model, full, part, compute)
        else:
            model.save_pretrained(part, state_dict={key: value.to(compute) for key, value in full.items()})
        tokenizer.save_pretrained(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    dist.barrier()
