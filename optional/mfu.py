"""Model FLOPs utilisation, where the device's peak rate is known."""

import torch

from common import fsdp

PEAK_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "B200": 2250e12}  # dense FLOP/s, data sheets


def mfu(model, tokens: int, seconds: float) -> dict:
    """Of an update of `tokens` (all ranks): 6 N FLOPs a token; empty where the peak is unknown."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = [flops for key, flops in PEAK_BF16.items() if key in name]
    flops = 6 * sum(p.numel() for p in model.parameters()) * tokens / seconds
    return {"perf/mfu": flops / (peak[0] * fsdp.world())} if peak else {}
