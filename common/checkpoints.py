"""Checkpoints to resume from, and the export that others open."""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sd

from common import distributed, lora, sharding
from common.cli import fail
from common.model_card import write_card


def _states(trained: dict) -> dict:
    """{name: {"model": weights, "optimizer": moments}}, as they are sharded: of LoRA the trained ones."""
    options = sd.StateDictOptions(ignore_frozen_params=True)
    states = {}
    for name, (model, optimizer) in trained.items():
        sharding.reshard(model)
        weights, moments = sd.get_state_dict(model, optimizer, options=options)
        if hasattr(model, "lora"):
            # a tied name is one more of a frozen weight, which the option above does not know
            tied = model.all_tied_weights_keys
            weights = {key: value for key, value in weights.items() if key not in tied}
        states[name] = {"model": weights, "optimizer": moments}
    return states


def _rng_file(folder: Path) -> Path:
    """Of this rank among so many: another number of ranks would draw other numbers."""
    return folder / f"rng-{distributed.rank()}-of-{distributed.world()}.pt"


def save_checkpoint(run_dir: str, step: int, trained: dict, extra: dict, keep: int) -> None:
    """checkpoints/step-N with models, optimizers, the random state of each rank and `extra` (JSON).

    `trained` maps a name to (model, optimizer). It is written under another name, then renamed: what is
    called step-N is whole. The newest `keep` checkpoints stay.
    """
    folder = Path(run_dir, "checkpoints")
    final = folder / f"step-{step:06d}"
    part = folder / f"part-{step:06d}"
    if distributed.rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    dcp.save(_states(trained), checkpoint_id=part / "dcp")
    rng = [torch.get_rng_state()]
    if torch.cuda.is_available():
        rng.append(torch.cuda.get_rng_state())
    torch.save(rng, _rng_file(part))
    dist.barrier()
    if distributed.rank() == 0:
        (part / "state.json").write_text(json.dumps({"step": step, **extra}))
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(run_dir: str, trained: dict) -> dict:
    """Restores the newest whole checkpoint in place; returns its `extra` with `step`; {} if there is none.

    Rank 0 chooses it for all. Ends with one line where it is another model's.
    """
    found = sorted(Path(run_dir, "checkpoints").glob("step-*/state.json"))
    found = distributed.all_gather_object(found)[0]
    if not found:
        return {}
    newest = found[-1]
    states = _states(trained)
    try:
        dcp.load(states, checkpoint_id=newest.parent / "dcp")
    except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        fail(f"{newest.parent}: --resume: it is no checkpoint of these models ({reason(error)})")
    for name, (model, optimizer) in trained.items():
        sd.set_state_dict(
            model,
            optimizer,
            model_state_dict=states[name]["model"],
            optim_state_dict=states[name]["optimizer"],
            options=sd.StateDictOptions(strict=not hasattr(model, "lora")),  # of LoRA the rest is not there
        )
    file = _rng_file(newest.parent)
    if file.exists():  # on another number of ranks there is none; only dropout (LoRA's) would draw from it
        rng = torch.load(file, weights_only=True)
        torch.set_rng_state(rng[0])
        if len(rng) > 1:
            torch.cuda.set_rng_state(rng[1])
    return json.loads(newest.read_text())


def reason(error: BaseException) -> str:
    """The first line that says something, of an error of torch's checkpoints: theirs list one per rank."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def export(model, tokenizer, folder: str, precision: str, made_by=None, **config) -> None:
    """A Hugging Face folder: weights (compute type), config with `config`, tokenizer with its template, and with
    `made_by`, the arguments of `write_card` after the tokenizer, a model card."""
    sharding.reshard(model)
    options = sd.StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = sd.get_model_state_dict(model, options=options)  # on rank 0
    if distributed.rank() == 0:
        final = Path(folder)
        part = Path(folder + ".part")
        shutil.rmtree(part, ignore_errors=True)
        compute, _ = distributed.dtypes(precision)
        vars(model.config).update(config)
        model.config.dtype = compute
        # on several ranks the gathered copies of tied weights share no memory, so both would be written
        tied = model.all_tied_weights_keys
        full = {key: value for key, value in full.items() if key not in tied}
        if hasattr(model, "lora"):
            lora.save(model, full, part, compute)
        else:
            model.save_pretrained(part, state_dict=sharding.in_type(compute, model, full.items()))
        tokenizer.save_pretrained(part)
        if made_by:  # before the old folder goes: it may be the base, whose card is read
            write_card(part, model, tokenizer, *made_by)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    dist.barrier()
