"""What a step costs: seconds, peak memory, and model FLOPs utilisation where the device's peak rate is known."""

import resource
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from common import distributed

PEAK_BF16 = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "B200": 2250e12,
}  # dense FLOP/s, data sheets


def mfu(model, tokens: int, seconds: float) -> dict:
    """Model FLOPs utilisation of an update of `tokens` (all ranks): 6 N FLOPs a token; empty where the peak is unknown."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = [flops for key, flops in PEAK_BF16.items() if key in name]
    flops = 6 * sum(p.numel() for p in model.parameters()) * tokens / seconds
    return {"perf/mfu": flops / (peak[0] * distributed.world())} if peak else {}


def peak_memory_gb(restart: bool = False) -> float:
    """Peak on this rank, of CUDA allocations, or on a CPU of the process's resident memory; `restart`: and count from here on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30
        _ = restart and torch.cuda.reset_peak_memory_stats()
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with suppress(OSError):  # Linux alone tells the peak apart by time
        peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20
        _ = restart and Path("/proc/self/clear_refs").write_text("5")
    return peak


def state_bytes(models, optimizers=()) -> int:
    """Bytes on this rank of weights, optimizer state and gradients (of the trained models: one more copy of the weights)."""
    tensors = [t for model in models for p in model.parameters() for t in [p] * (2 if p.requires_grad else 1)]
    tensors += [t for optimizer in optimizers for state in optimizer.state.values() for t in state.values()]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.nbytes for t in local if t.untyped_storage().nbytes())  # parked models have none here


class Phases:
    """Seconds and peak memory of an RL step's phases: `end("rollout")`, `end("scoring")`, `end("update")`, then `metrics`."""

    def __init__(self):
        self.seconds, self.memory, self.since = {}, {}, time.perf_counter()
        peak_memory_gb(restart=True)

    def end(self, name: str) -> None:
        self.memory[name] = peak_memory_gb(
            restart=True
        )  # waits for the GPU, or a phase would be charged for the one before
        self.seconds[name], self.since = time.perf_counter() - self.since, time.perf_counter()

    def metrics(self, model, rollout_tokens: int, update_tokens: int) -> dict:
        (rollout, scoring, update), whole, memory = (
            self.seconds.values(),
            sum(self.seconds.values()),
            self.memory,
        )
        return mfu(model, update_tokens, update) | {
            "time/rollout_s": rollout,
            "time/scoring_s": scoring,
            "time/update_s": update,
            "time/step_s": whole,
            "memory/rollout_gb": memory["rollout"],
            "memory/scoring_gb": memory["scoring"],
            "memory/update_gb": memory["update"],
            "memory/peak_gb": max(memory.values()),
            "perf/rollout_share": rollout / whole,
            "perf/rollout_tokens_per_s": rollout_tokens / rollout,
            "perf/update_tokens_per_s": update_tokens / update,
        }
