"""Checkpoints to resume from, and the export that others open."""

import json
import pickle
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sd
from torch.distributed.tensor import DTensor

from common import distributed, durable, lora, sharding
from common.cli import fail, note
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


def require_finite(model, what: str) -> None:
    """Ends with one line, on every rank, where a trained weight is not finite: it is not to be written."""
    sharding.reshard(model)
    bad = ""
    for name, weight in model.named_parameters():
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        if weight.requires_grad and not bool(torch.isfinite(local).all()):
            bad = name
            break
    bad = next((name for name in distributed.all_gather_object(bad) if name), "")
    if bad:
        fail(f"{what} is not written: its weight {bad} is not finite; a lower learning rate may help")


def save_checkpoint(run_dir: str, step: int, trained: dict, extra: dict, keep: int) -> None:
    """checkpoints/step-N with models, optimizers, the random state of each rank, `extra` (JSON) and checksums
    of them all.

    `trained` maps a name to (model, optimizer). It is written under another name, onto the disk, then renamed:
    what is called step-N is whole. The newest `keep` checkpoints stay. Ends with one line where a weight is not
    finite.
    """
    folder = Path(run_dir, "checkpoints")
    final = folder / f"step-{step:06d}"
    part = folder / f"part-{step:06d}"
    for name, (model, _) in trained.items():
        require_finite(model, f"{final}, {name},")
    if distributed.rank() == 0:
        for left in folder.glob("part-*"):  # by a run that was killed as it wrote, perhaps at another step
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dcp.save(_states(trained), checkpoint_id=part / "dcp")
    rng = [torch.get_rng_state()]
    if torch.cuda.is_available():
        rng.append(torch.cuda.get_rng_state())
    with open(_rng_file(part), "wb") as file:  # by the path, torch would not say that the disk is full
        torch.save(rng, file)
    if distributed.rank() == 0:
        durable.write_text(part / "state.json", json.dumps({"step": step, **extra}))
    dist.barrier()
    # each rank those of the files that it wrote: another node's may not be seen yet on a network file system
    mine = [name for name in durable.files(part) if _writer(name) == distributed.rank()]
    found = _gathered_checksums(part, mine)
    if distributed.rank() == 0:
        durable.write_text(part / durable.CHECKSUMS, json.dumps(found, indent=1))
        durable.replace(part, final)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            durable.remove(old)
    dist.barrier()


def _writer(name: str) -> int:
    """The rank that writes a file of a checkpoint: torch's and ours have its number in their names."""
    found = re.match(r"dcp/__(\d+)_|rng-(\d+)-of-", name)
    return int(found[1] or found[2]) if found else 0


def _gathered_checksums(folder: Path, mine: list[str]) -> dict[str, str]:
    """Those of the files that all ranks have as `mine`, on every rank."""
    parts = distributed.all_gather_object(durable.checksums(folder, mine))
    return {name: checksum for part in parts for name, checksum in part.items()}


def _checksums(folder: Path) -> dict[str, str]:
    """Those of all files of a checkpoint, on every rank; each rank reads its share of rank 0's list."""
    names = distributed.all_gather_object(durable.files(folder))[0]
    return _gathered_checksums(folder, names[distributed.rank() :: distributed.world()])


def newest_whole(run_dir: str) -> Path | None:
    """The newest checkpoint whose checksums are right; None where there is none at all.

    A damaged one is named and set aside, so that it is neither used nor counted. Ends with one line where all
    are damaged.
    """
    folder = Path(run_dir, "checkpoints")
    found = sorted(folder.glob("step-*"), reverse=True)
    found = distributed.all_gather_object(found)[0]
    for checkpoint in found:
        wrong = durable.damage(checkpoint, _checksums(checkpoint))
        wrong = distributed.all_gather_object(wrong)[0]  # rank 0's view
        if not wrong:
            return checkpoint
        if distributed.rank() == 0:
            aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
        note(f"{checkpoint}: {wrong}; it is set aside as damaged-{checkpoint.name}")
    if found:
        fail(f"{folder}: no checkpoint is whole; --overwrite begins anew")
    return None


def load_checkpoint(run_dir: str, trained: dict) -> dict:
    """Restores the newest whole checkpoint in place; returns its `extra` with `step`; {} if there is none.

    Rank 0 chooses it for all. Ends with one line where it is another model's, or names what no checkpoint
    holds: a run folder is data, and nothing in it is run.
    """
    newest = newest_whole(run_dir)
    if newest is None:
        return {}
    try:
        durable.read_index(newest / "dcp")  # first, because torch says more than a line of a bad one
    except Exception as error:  # a pickle that is none may lead to any
        fail(f"{newest}: --resume: it is no checkpoint ({reason(error)})")
    states = _states(trained)
    try:
        dcp.load(states, storage_reader=durable.Reader(newest / "dcp"), planner=durable.Planner())
    except (dcp.api.CheckpointException, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        fail(f"{newest}: --resume: it is no checkpoint of these models ({reason(error)})")
    for name, (model, optimizer) in trained.items():
        sd.set_state_dict(
            model,
            optimizer,
            model_state_dict=states[name]["model"],
            optim_state_dict=states[name]["optimizer"],
            options=sd.StateDictOptions(strict=not hasattr(model, "lora")),  # of LoRA the rest is not there
        )
    file = _rng_file(newest)
    if file.exists():  # on another number of ranks there is none; only dropout (LoRA's) would draw from it
        rng = torch.load(file, weights_only=True)
        torch.set_rng_state(rng[0])
        if len(rng) > 1:
            torch.cuda.set_rng_state(rng[1])
    return json.loads((newest / "state.json").read_text())


def reason(error: BaseException) -> str:
    """The first line that says something, of an error of torch's checkpoints: theirs list one per rank."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def export(model, tokenizer, folder: str, precision: str, made_by=None, **config) -> None:
    """A Hugging Face folder: weights (compute type), config with `config`, tokenizer with its template, and with
    `made_by`, the arguments of `write_card` after the tokenizer, a model card. Ends with one line where a weight
    is not finite."""
    require_finite(model, folder)
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
        durable.replace(part, final)
    dist.barrier()
