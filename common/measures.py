"""Numbers of an evaluation: pair accuracies of values and of log-ratios, diversity."""

import json
import math

import numpy as np
import torch

STATISTICS = ("mean", "p1", "p5", "p10", "p90", "p95", "p99", "last")


def response_statistics(values: list[float]) -> dict[str, float]:
    """Mean, percentiles (linear interpolation) and last of one response's token values (2502.16944 appendix E)."""
    percentiles = np.percentile(values, [int(name[1:]) for name in STATISTICS[1:-1]])
    return dict(
        zip(STATISTICS, [float(np.mean(values)), *percentiles.tolist(), float(values[-1])], strict=True)
    )


def pair_accuracy(chosen: list[list[float]], rejected: list[list[float]]) -> dict[str, float]:
    """Share of pairs whose chosen response has the strictly higher statistic of its token values; a tie is not a win."""
    pairs = [(response_statistics(c), response_statistics(r)) for c, r in zip(chosen, rejected, strict=True)]
    return {name: sum(c[name] > r[name] for c, r in pairs) / len(pairs) for name in STATISTICS}


def make_pairs(rows: list[dict], gap: float) -> list[tuple[dict, dict]]:
    """All (better, worse) pairs of responses to one prompt (where rows came in pairs: of that pair), `gap` of reward apart."""
    groups = {}
    for row in rows:
        groups.setdefault(row.get("pair", json.dumps(row["prompt"])), []).append(row)
    return [
        (a, b)
        for group in groups.values()
        for a in group
        for b in group
        if a["reward"] - b["reward"] >= max(gap, 1e-9)
    ]


def implied_accuracy(log_ratios, rewards, groups):
    """Share of the pairs of responses to one prompt whose better one has the strictly higher log-ratio; all [N]. NaN: no pair."""
    order, wins, pairs = torch.argsort(groups).cpu(), 0, 0
    sizes = torch.bincount(groups.cpu()).tolist()
    for r, y in zip(
        rewards.cpu()[order].split(sizes), log_ratios.cpu()[order].split(sizes), strict=True
    ):  # never all N x N
        better = r[:, None] > r[None]
        wins, pairs = wins + ((y[:, None] > y[None]) & better).sum().item(), pairs + better.sum().item()
    return wins / pairs if pairs else math.nan


def auc(log_ratios, labels):
    """Share of all pairs of a desirable and an undesirable response whose first has the strictly higher log-ratio; both [N].
    NaN where there is no pair."""
    good, bad = log_ratios[labels], log_ratios[~labels].sort().values
    below = torch.searchsorted(bad, good)  # how many are strictly lower
    return below.double().sum().item() / (len(good) * len(bad)) if len(good) * len(bad) else math.nan


def distinct_2(texts):
    """Different pairs of neighbouring words over all pairs, in all texts together: diversity (1510.03055)."""
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))
