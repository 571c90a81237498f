"""Processes: torchrun's, or one alone. Plain `python script.py` is world size 1 of the same path.

Ranks hold the same global batch, each computes its share."""

import gc
import itertools
import os
import sys
import time
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common.cli import ENDING, fail
from common.durable import disk_full

MEETINGS = itertools.count()  # the same number on every rank at the same place

# gloo's words for a rank that it no longer reaches
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Connection timed out",
    "No route to host",
    "Network is unreachable",
)


def rank() -> int:
    """This process, 0 to world() - 1."""
    return dist.get_rank()


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size()


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def launch(main, args) -> None:
    """Runs `main(args)` among the processes torchrun started, or alone."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    if "RANK" in os.environ:  # set by torchrun
        try:
            dist.init_process_group(backend, timeout=timedelta(minutes=args.timeout_minutes))
        except RuntimeError as error:
            ranks = os.environ.get("WORLD_SIZE")
            fail(f"the {ranks} ranks have not met ({type(error).__name__}: {str(error).splitlines()[0]})")
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(args.seed)
    try:
        mesh(args.shard_size)  # a size that does not divide stops here
        main(args)
    except (Exception, CheckpointException) as error:  # the second is none of the first
        if disk_full(error):
            fail(f"no space left on {getattr(args, 'run_dir', 'the disk')}; what was saved before is whole")
        # the other ranks may wait in a collective: no tidy end, or this one would wait with them
        if world() == 1:
            raise
        ENDING.set()
        lost = words_of_a_lost_rank(error)
        if lost:
            if "Timed out" not in lost:
                time.sleep(10)  # the one that has gone says why; torchrun ends this one meanwhile
            fail(f"rank {rank()} has lost another rank: {lost}; what was saved before is whole")
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    finally:
        mesh.cache_clear()
        gc.collect()  # FSDP's models must be gone before the process group, or gloo aborts at exit
        dist.destroy_process_group()


def words_of_a_lost_rank(error: BaseException) -> str:
    """The line of an error that says that another rank is gone, or a link to it; "" where it says no such thing."""
    if isinstance(error, RuntimeError | CheckpointException):
        for line in str(error).splitlines():
            if any(words in line for words in LOST):
                return line.strip().partition(". This is typically")[0]  # gloo's advice and good wishes
    return ""


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place."""
    dist.all_reduce(tensor)
    return tensor


def all_reduce_dict(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Each rank's sums, by name, added over the ranks in one exchange."""
    total = all_reduce(torch.stack(list(sums.values())))
    return dict(zip(sums, total.tolist(), strict=True))


def wait_for_rank_0() -> None:
    """The other ranks wait until rank 0 gets here, however long that takes: in a collective, --timeout-minutes
    would end them. Where rank 0 ends instead, torchrun ends them, or the store that it kept is gone."""
    key = f"rank 0 is here/{next(MEETINGS)}"
    store = dist.distributed_c10d._get_default_store()
    if rank() == 0:
        store.set(key, "yes")
    else:
        store.wait([key], timedelta(days=30))


def largest(numbers: list[int]) -> list[int]:
    """Of each number the largest of all ranks."""
    tensor = torch.tensor(numbers, device=device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def all_gather_object(value) -> list:
    """Each rank's value (it is pickled), by rank, on every rank."""
    out = [None] * world()
    dist.all_gather_object(out, value)
    return out


def dtypes(precision: str) -> tuple[torch.dtype, torch.dtype]:
    """(compute type, type of the master weights), which are never narrower than float32.

    `auto`: bf16 compute on a GPU, float32 on a CPU. `fp64` is for tests of equality.
    """
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    if precision == "bf16":
        return torch.bfloat16, torch.float32
    if precision == "fp64":
        return torch.float64, torch.float64
    return torch.float32, torch.float32


@cache
def mesh(shard_size: int) -> DeviceMesh:
    """One dimension (shard over all ranks), or replicate x shard for `shard_size` ranks per replica (HSDP).

    Ends with one line where the size does not divide the ranks.
    """
    size = shard_size or world()
    if world() % size:
        fail(f"--shard-size {size} does not divide the {world()} processes")
    if size == world():
        return init_device_mesh(device().type, (size,), mesh_dim_names=("shard",))
    replicas = world() // size
    return init_device_mesh(device().type, (replicas, size), mesh_dim_names=("replicate", "shard"))
