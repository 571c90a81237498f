"""What a step costs: seconds, peak memory, and model FLOPs utilisation where the peak rate is known."""

import resource
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from common import distributed

PEAK_BF16 = {  # dense FLOP/s, from the data sheets
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


def mfu(model, tokens: int, seconds: float) -> dict[str, float]:
    """Model FLOPs utilisation of an update of `tokens` (all ranks): {"perf/mfu": ...}.

    Empty where the device's peak is unknown. 6 N FLOPs per token of a model with N parameters: 2 in the
    forward pass, 4 in the backward pass.
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peaks = [flops for key, flops in PEAK_BF16.items() if key in name]
    if not peaks:
        return {}
    flops = 6 * sum(p.numel() for p in model.parameters()) * tokens / seconds
    return {"perf/mfu": flops / (peaks[0] * distributed.world())}


def peak_memory_gb(restart: bool = False) -> float:
    """Peak on this rank, in GiB: of CUDA allocations, or on a CPU of the process's resident memory.

    `restart`: the next peak counts from here on.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with suppress(OSError):  # only Linux has a peak that can start anew
        peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
    return peak


def state_bytes(models, optimizers=()) -> int:
    """Bytes on this rank of weights, gradients and optimizer state; a trained model's gradients are as large
    as its weights."""
    tensors = []
    for model in models:
        for parameter in model.parameters():
            tensors.append(parameter)
            if parameter.requires_grad:
                tensors.append(parameter)  # for its gradient
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += state.values()
    total = 0
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.untyped_storage().nbytes():  # a parked model has none here
            total += local.nbytes
    return total


class Phases:
    """Seconds and peak memory of an RL step's phases: `end("rollout")`, `end("scoring")`, `end("update")`,
    then `metrics`."""

    def __init__(self):
        self.seconds = {}
        self.memory = {}
        self.since = time.perf_counter()
        peak_memory_gb(restart=True)

    def end(self, name: str) -> None:
        """A phase ends here, and the next begins."""
        # this waits for the GPU, or a phase would be charged for the one before
        self.memory[name] = peak_memory_gb(restart=True)
        now = time.perf_counter()
        self.seconds[name] = now - self.since
        self.since = now

    def metrics(self, model, rollout_tokens: int, update_tokens: int) -> dict[str, float]:
        """The step's `time/`, `memory/` and `perf/` metrics; tokens of all ranks."""
        rollout = self.seconds["rollout"]
        update = self.seconds["update"]
        whole = sum(self.seconds.values())
        return mfu(model, update_tokens, update) | {
            "time/rollout_s": rollout,
            "time/scoring_s": self.seconds["scoring"],
            "time/update_s": update,
            "time/step_s": whole,
            "memory/rollout_gb": self.memory["rollout"],
            "memory/scoring_gb": self.memory["scoring"],
            "memory/update_gb": self.memory["update"],
            "memory/peak_gb": max(self.memory.values()),
            "perf/rollout_share": rollout / whole,
            "perf/rollout_tokens_per_s": rollout_tokens / rollout,
            "perf/update_tokens_per_s": update_tokens / update,
        }
