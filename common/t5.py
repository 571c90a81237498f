"""What differs for encoder-decoder policies (the T5 family): the encoder reads the prompt alone."""

import torch
import transformers

from common.cli import fail


def checked(config: transformers.PretrainedConfig, kind: str, name: str) -> str:
    """The kind of model to open, a key of models.AUTO. Ends with one line where it cannot be used."""
    if kind in ("value", "reward"):
        fail(
            f"{name}: an encoder-decoder cannot be a {kind} model here; "
            "its encoder would see the tokens it is to judge"
        )
    if not hasattr(config, "relative_attention_num_buckets"):
        fail(f"{name}: of the encoder-decoders only the T5 family is supported, not {config.model_type}")
    return "encoder-decoder" if kind == "policy" else kind


def only_prompts(input_ids: torch.Tensor, prompt_lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts of collated sequences, [B, P], and their attention mask, [B, P]."""
    columns = torch.arange(int(prompt_lengths.max()), device=input_ids.device)
    mask = columns < prompt_lengths[:, None]
    return input_ids[:, : mask.shape[1]], mask.long()


def hidden_states(
    model, input_ids: torch.Tensor, prompt_lengths: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(decoder's last hidden states [B, T, H] for the response `tokens` [B, T], encoder's mean over each
    prompt [B, H])."""
    ids, mask = only_prompts(input_ids, prompt_lengths)
    encoder_states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state  # [B, P, H]
    # the decoder reads each token to say the next one, and begins with a token of its own
    start = torch.full_like(tokens[:, :1], model.config.decoder_start_token_id)
    shifted = torch.cat([start, tokens[:, :-1]], 1)
    out = model.get_decoder()(
        input_ids=shifted,
        encoder_hidden_states=encoder_states,
        encoder_attention_mask=mask,
        use_cache=False,
    )
    prompt_mean = (encoder_states * mask[..., None]).sum(1) / prompt_lengths[:, None]
    return out.last_hidden_state, prompt_mean
