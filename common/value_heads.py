"""What value and reward models say of a response: V(s_1), Q(s_t, a_t), a score; and the head that says it."""

import torch

from common.batches import response_positions


def head(model) -> torch.nn.Module:
    """The linear layer of a value or reward model, under either of transformers' names."""
    return model.score if hasattr(model, "score") else model.classifier


def response_values(
    model, input_ids: torch.Tensor, prompt_lengths: torch.Tensor, response_mask: torch.Tensor
) -> torch.Tensor:
    """[B, T + 1]: V(s_1) at the last prompt token, then Q(s_t, a_t) at each response token; masked: zero."""
    values = model(input_ids=input_ids, use_cache=False).logits.squeeze(-1)  # [B, L]
    positions = response_positions(prompt_lengths, response_mask, input_ids.shape[1])
    values = values.gather(1, positions)  # [B, T + 1]
    mask = torch.cat([response_mask[:, :1], response_mask], 1)  # V(s_1) counts where there is a response
    return values.masked_fill(~mask, 0.0)


def sequence_scores(
    model, input_ids: torch.Tensor, prompt_lengths: torch.Tensor, response_mask: torch.Tensor
) -> torch.Tensor:
    """[B, 1] scores of a reward model. transformers reads the score at the last token that is not padding
    (where pad is eos: at the one before the eos), so it needs neither lengths nor mask."""
    return model(input_ids=input_ids, use_cache=False).logits
