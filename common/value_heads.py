"""What value and reward models say of a response: V(s_1), Q(s_t, a_t), a score; and the head that says it."""

import torch

from common.batches import response_positions


def head(model) -> torch.nn.Module:
    """The linear layer of a value or reward model, under either of transformers' names."""
    return model.score if hasattr(model, "score") else model.classifier


def learned_signs(config) -> bool:
    """Whether a model is a GVM whose returns were +1 and -1, which gvm_td.py neither shifts nor scales."""
    return getattr(config, "return_mean", None) == 0 and getattr(config, "return_std", None) == 1


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
    (where pad is eos: at the one before the eos), so a decoder needs neither lengths nor mask.

    An encoder is told where each sequence ends (`model.needs_mask`) and, if it knows two kinds of text, where
    the response begins (`model.needs_types`).
    """
    inputs = {"input_ids": input_ids}
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    lengths = prompt_lengths + response_mask.sum(1)
    if model.needs_mask:
        inputs["attention_mask"] = (places < lengths[:, None]).long()
    if model.needs_types:
        inputs["token_type_ids"] = (places >= prompt_lengths[:, None]).long()
    return model(**inputs, use_cache=False).logits
