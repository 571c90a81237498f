"""Frozen models that wait in the host's memory between the passes that read them: `--offload-frozen`."""

from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor


def copy(to: torch.UntypedStorage, source: torch.UntypedStorage) -> None:
    """The one place where bytes move, so that the memory planner can replace it."""
    to.copy_(source, non_blocking=True)


def park(models: list) -> None:
    """Moves this rank's weights of the frozen ones among `models` to the host, pinned where there is a GPU.

    They never change, so they are copied out once, and later only dropped.
    """
    for model in models:
        if getattr(model, "frozen", False):
            park_one(model)


def park_one(model) -> None:
    """Sets `model.parked`, (storage on the device, its copy on the host) of each weight; frees the former."""
    storages = {}  # by address: tied weights share one
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        storage = local.untyped_storage()
        storages[storage._cdata] = storage
    model.parked = []
    on_gpu = False
    for storage in storages.values():
        host = torch.UntypedStorage(storage.nbytes())
        if storage.device.type == "cuda":
            host = host.pin_memory()
            on_gpu = True
        copy(host, storage)
        model.parked.append((storage, host))
    if on_gpu:
        torch.cuda.synchronize()  # the copies are there before what they copy is dropped
    for storage, _ in model.parked:
        storage.resize_(0)


@contextmanager
def on_device(model):
    """Inside, the weights of a parked model are on the device; any other model is where it was."""
    parked = getattr(model, "parked", ())
    for storage, host in parked:
        storage.resize_(host.nbytes())
        copy(storage, host)
    try:
        yield
    finally:
        for storage, _ in parked:
            storage.resize_(0)
