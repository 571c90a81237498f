"""common/batches.py: one pass over all sequences reads each different one once."""

import pytest
import torch

from common.batches import run_micro_batches

A = ([1, 2], [3, 4])
B = ([1], [2, 3, 4])  # the same tokens, cut elsewhere
C = ([1, 2], [3])


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("sequences", [[A, B, C], [A, B, A, C, C, A], [C, C], []])
def test_a_sequence_that_stands_twice_is_read_once(size, sequences, group):
    """And its result is in each of its places."""
    read = []

    def forward(mb):
        rows = []
        for ids, length, mask in zip(mb["input_ids"], mb["prompt_lengths"], mb["response_mask"], strict=True):
            prompt, response = int(length), int(mask.sum())
            read.append((ids[:prompt].tolist(), ids[prompt : prompt + response].tolist()))
            rows.append([10 * prompt + response, int(ids[prompt])])
        return torch.tensor(rows, dtype=torch.float32)

    found = run_micro_batches(forward, sequences, size, 0, 3)
    expected = [[10 * len(prompt) + len(response), response[0], 0] for prompt, response in sequences]
    assert found.shape == (len(sequences), 3)
    assert found.tolist() == expected
    if sequences:
        assert sorted(read) == sorted([each for each in (A, B, C) if each in sequences])
