"""Frozen models that wait in the host's memory between the passes that read them: `--offload-frozen`."""

from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor


def copy(to: torch.UntypedStorage, source: torch.UntypedStorage) -> None:
    to.copy_(source, non_blocking=True)


def park(models) -> None:
    """Moves this rank's weights of the frozen ones among `models` to the host, pinned where there is a GPU. They never change, so
    they are copied out once, and later only dropped."""
    for model in [model for model in models if getattr(model, "frozen", False)]:
        tensors = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        storages = {
            storage._cdata: storage for storage in (t.untyped_storage() for t in tensors)
        }  # tied weights share one
        model.parked = []
        for storage in storages.values():
            host = torch.UntypedStorage(storage.nbytes())
            host = host.pin_memory() if storage.device.type == "cuda" else host
            copy(host, storage)
            model.parked.append((storage, host))
        if any(storage.device.type == "cuda" for storage in storages.values()):
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
