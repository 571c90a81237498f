"""What the comparison at load (common/checks.py) costs: seconds and memory beside the load itself, on this
device; and its memory on N GPUs, planned without one.

    OMP_NUM_THREADS=1 python benchmarks/load_check.py --model SmolLM2-135M-Instruct
    python benchmarks/load_check.py --plan Llama-3-8B --gpus 8

A trained policy is loaded (every comparison, and one backward pass), a frozen one, and a value model.
"""

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import checks, distributed, models
from common.batches import collate
from common.tokenization import load_tokenizer
from tools import plan_memory

GB = 2**30


class Watch:
    """Takes the place of a check: calls it, and adds up its seconds and the bytes that it needed."""

    def __init__(self, check):
        self.check = check
        self.seconds = 0.0
        self.size = 0

    def __call__(self, *args):
        start_peak()
        before = memory_now()
        begin = time.perf_counter()
        self.check(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - begin
        self.size = peak() - before


def start_peak() -> None:
    """The peak counts from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory


def status(key: str) -> int:
    """Bytes by /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def memory_now() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else status("VmRSS")


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status("VmHWM")


def measure(name: str, precision: str) -> None:
    """One line for each kind of model."""
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    args = SimpleNamespace(precision=precision, shard_size=0, gradient_checkpointing=False, lora_rank=0)
    tokenizer = load_tokenizer(name)
    print(f"{name}, {precision}, {distributed.device().type}")
    for kind, trained in (("policy", True), ("policy", False), ("value", True)):
        watches = {check: Watch(getattr(checks, check)) for check in ("check_policy", "check_head")}
        begin = time.perf_counter()
        with mock.patch.multiple(checks, **watches):
            model = models.load_model(kind, name, tokenizer, args, trained=trained)
        whole = time.perf_counter() - begin
        seconds = sum(watch.seconds for watch in watches.values())
        size = max(watch.size for watch in watches.values())
        weights = sum(parameter.nbytes for parameter in model.parameters())
        use = "trained" if trained else "frozen"
        print(
            f"  {kind}, {use}: load {whole - seconds:.2f} s, check {seconds:.2f} s; "
            f"weights {weights / GB:.2f} GB, check {size / GB:.2f} GB more"
        )
    dist.destroy_process_group()


def plan(name: str, gpus: int) -> None:
    """What the backward pass of the check adds to a rank's share of a trained policy."""
    found = {}

    def planned(policy, *_):
        tracker = next(
            mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, plan_memory.Tracker)
        )
        found["weights"] = tracker.total
        tracker.peaks[tracker.phase()] = 0
        sequences = checks.random_sequences(list(range(3, 64)))
        with torch.enable_grad():
            batch = collate(sequences, 0, distributed.device())
            policy.response_logprobs(**batch)[0].sum().backward()
        found["peak"] = tracker.peaks[tracker.phase()]
        for parameter in policy.parameters():
            parameter.grad = None
        raise plan_memory.Enough

    with mock.patch.object(plan_memory, "nothing", planned):
        plan_memory.measure("sft", ["--model", name, "--eval-fraction", "0.5"], gpus)
    more = found["peak"] - found["weights"]
    print(f"{name} on {gpus} GPUs, GB a GPU: weights {found['weights'] / GB:.2f}, check {more / GB:.2f} more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="", help="a folder or hub id")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--plan", default="", help="a preset of tools/plan_memory.py, or a folder")
    parser.add_argument("--gpus", type=int, default=8)
    options = parser.parse_args()
    if options.model:
        measure(options.model, options.precision)
    if options.plan:
        plan(options.plan, options.gpus)


if __name__ == "__main__":
    main()
