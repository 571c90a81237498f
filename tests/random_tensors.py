"""Ragged masks and noise for the tests of pure functions."""

import torch

NAN = float("nan")
INF = float("inf")


def ragged(lengths, width=None):
    """A response mask [B, T] of these lengths."""
    return torch.arange(width or max(lengths))[None] < torch.tensor(lengths)[:, None]


def noise(*shape, seed=0):
    """Standard normal float64, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
