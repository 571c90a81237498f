"""Ragged sequences to micro-batches, positions in them, one pass over all of them."""

import math

import torch

from common import distributed, offload


def permutation(n: int, number: int, seed: int) -> list[int]:
    """The `number`-th random order of n rows, the same on every rank and after a resume."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + number)).tolist()


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The rows of batch `step` (0-based): epochs of fresh permutations, no state, the last short batch left out."""
    epoch, position = divmod(step, max(1, n // batch_size))
    order = permutation(n, epoch, seed)
    return [order[i % n] for i in range(position * batch_size, (position + 1) * batch_size)]


def response_mask(responses: list[list[int]], device) -> torch.Tensor:
    """[N, T] True where a response has a token; T is the length of the longest, at least 1."""
    lengths = torch.tensor([len(response) for response in responses])
    return (torch.arange(max(1, int(lengths.max()))) < lengths[:, None]).to(device)


def collate(sequences: list[tuple[list[int], list[int]]], pad_id: int, device) -> dict[str, torch.Tensor]:
    """(prompt tokens, response tokens) pairs to right-padded tensors.
    Returns input_ids [B, L], prompt_lengths [B], response_mask [B, T]: all masks come from positions, never from
    `token != pad`. An empty list gives one masked dummy sequence: a rank with nothing to do still joins the collectives."""
    sequences = sequences or [([pad_id], [])]
    lengths = torch.tensor([[len(p), len(r)] for p, r in sequences])
    input_ids = torch.full((len(sequences), max(2, int(lengths.sum(1).max()))), pad_id)
    for i, (prompt, response) in enumerate(sequences):
        input_ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
    mask = torch.arange(max(1, int(lengths[:, 1].max()))) < lengths[:, 1:]
    return {
        "input_ids": input_ids.to(device),
        "prompt_lengths": lengths[:, 0].to(device),
        "response_mask": mask.to(device),
    }


def micro_batches(indices, lengths: list[int], size: int, rank: int, world: int) -> list[list[int]]:
    """This rank's micro-batches of a global batch: sorted by length (little padding, balanced ranks), dealt out in turn.
    Every rank gets the same number of them (collectives must match), the last ones empty if need be."""
    order = sorted(indices, key=lambda i: (-lengths[i], i))
    count = math.ceil(math.ceil(len(order) / world) / size)
    return [order[rank::world][i * size : (i + 1) * size] for i in range(count)]


def response_positions(prompt_lengths, response_mask, width: int):
    """[B, T + 1] positions in the sequence of the last prompt token and of each response token, clamped to `width`."""
    return (
        prompt_lengths[:, None] + torch.arange(-1, response_mask.shape[1], device=prompt_lengths.device)
    ).clamp(max=width - 1)


def run_micro_batches(
    forward, sequences, size: int, pad_id: int, width: int, dtype=torch.float32, model=None
):
    """[N, width] results of `forward(micro-batch) -> [b, t]` for all N global sequences, on every rank. `model`: which of those
    that --offload-frozen parks is read. No gradient. Each rank computes its share, length-sorted; the sum puts the rest in."""
    out = torch.zeros(len(sequences), width, dtype=dtype, device=distributed.device())
    lengths = [len(p) + len(r) for p, r in sequences]
    with torch.no_grad(), offload.on_device(model):
        for pick in micro_batches(
            range(len(sequences)), lengths, size, distributed.rank(), distributed.world()
        ):
            result = forward(collate([sequences[i] for i in pick], pad_id, out.device))
            if pick:
                out[torch.tensor(pick, device=out.device), : result.shape[1]] = result.to(dtype)
    return distributed.all_reduce(out)
