"""Ragged sequences to micro-batches, positions in them, one pass over all of them.

Below, L is the length of a padded sequence, T that of the longest response.
"""

import math
from collections.abc import Callable, Iterable

import torch

from common import distributed, offload
from common.cli import fail

Sequence = tuple[list[int], list[int]]  # (prompt tokens, response tokens)


def permutation(n: int, number: int, seed: int) -> list[int]:
    """The `number`-th random order of n rows, the same on every rank and after a resume."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)  # a prime: seeds do not meet
    return torch.randperm(n, generator=generator).tolist()


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The rows of batch `step` (0-based): fresh permutations, no state, no short last batch."""
    batches_per_epoch = max(1, n // batch_size)
    epoch, position = divmod(step, batches_per_epoch)
    order = permutation(n, epoch, seed)
    start = position * batch_size
    # % n: a batch may be larger than the data
    return [order[i % n] for i in range(start, start + batch_size)]


def response_mask(responses: list[list[int]], device) -> torch.Tensor:
    """[N, T] True where a response has a token; T is the length of the longest, at least 1."""
    lengths = torch.tensor([len(response) for response in responses])
    return (torch.arange(max(1, int(lengths.max()))) < lengths[:, None]).to(device)


def collate(sequences: list[Sequence], pad_id: int, device) -> dict[str, torch.Tensor]:
    """(prompt tokens, response tokens) pairs to right-padded tensors.

    Returns input_ids [B, L], prompt_lengths [B], response_mask [B, T]: all masks come from positions, never
    from `token != pad`. An empty list gives one masked dummy sequence: a rank with nothing to do still joins
    the collectives.
    """
    sequences = sequences or [([pad_id], [])]
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in sequences])
    width = max(2, *(len(prompt) + len(response) for prompt, response in sequences))
    input_ids = torch.full((len(sequences), width), pad_id)
    for i, (prompt, response) in enumerate(sequences):
        input_ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
    return {
        "input_ids": input_ids.to(device),
        "prompt_lengths": prompt_lengths.to(device),
        "response_mask": response_mask([response for _, response in sequences], device),
    }


def micro_batches(
    indices: Iterable[int], lengths: list[int], size: int, rank: int, world: int
) -> list[list[int]]:
    """This rank's micro-batches of a global batch: sorted by length (little padding), dealt out in turn.

    Every rank gets the same number of them (collectives must match), the last ones empty if need be.
    """
    order = sorted(indices, key=lambda i: (-lengths[i], i))
    longest_share = math.ceil(len(order) / world)
    count = math.ceil(longest_share / size)
    mine = order[rank::world]
    return [mine[i * size : (i + 1) * size] for i in range(count)]


def response_positions(prompt_lengths: torch.Tensor, response_mask: torch.Tensor, width: int) -> torch.Tensor:
    """[B, T + 1] positions in the sequence of the last prompt token and of each response token.

    Clamped to `width` - 1: where a response is shorter than T they would lie beyond the sequence; the mask
    leaves them out.
    """
    steps = torch.arange(-1, response_mask.shape[1], device=prompt_lengths.device)
    return (prompt_lengths[:, None] + steps).clamp(max=width - 1)


def run_micro_batches(
    forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    sequences: list[Sequence],
    size: int,
    pad_id: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    model=None,
) -> torch.Tensor:
    """[N, width] results of `forward(micro-batch) -> [b, t]` for all N global sequences, on every rank.

    Without gradient, and once for each different sequence: `forward` must depend on nothing else. Each rank
    computes its share, length-sorted; the sum over ranks puts the rest in.
    `model`: which is read: one that --offload-frozen has parked is fetched. Ends with one line that names it where
    a result is not a number or infinite.
    """
    # A response that is in several pairs is read once.
    position = {}  # of each different sequence, in the order of their first
    index = [position.setdefault((*prompt, None, *response), len(position)) for prompt, response in sequences]
    sequences = list(dict(zip(index, sequences, strict=True)).values())
    out = torch.zeros(len(sequences), width, dtype=dtype, device=distributed.device())
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    mine = micro_batches(range(len(sequences)), lengths, size, distributed.rank(), distributed.world())
    with torch.no_grad(), offload.on_device(model):
        for pick in mine:
            result = forward(collate([sequences[i] for i in pick], pad_id, out.device))
            if pick:  # else it was the dummy sequence
                out[torch.tensor(pick, device=out.device), : result.shape[1]] = result.to(dtype)
    distributed.all_reduce(out)
    # -inf is the log-probability of a token that cannot be sampled
    if model is not None and bool((out.isnan() | (out == torch.inf)).any()):
        fail(f"{described(model)} gives numbers that are not finite")
    return out[torch.tensor(index, dtype=torch.long, device=out.device)]


def described(model) -> str:
    """A model in words: the policy and its reference may come from one folder."""
    config = model.config
    how = "frozen" if getattr(model, "frozen", False) else "trained"
    return f"{config.name_or_path}: the {how} {type(model).__name__.removeprefix('FSDP')}"
