"""What differs for encoder-decoder policies (the T5 family): the prompt is read by the encoder, the response by the decoder."""

import torch

from common.cli import fail


def checked(config, kind: str, name: str) -> str:
    """The kind of model to open. Ends with one line where it cannot be used."""
    if kind in ("value", "reward"):
        fail(
            f"{name}: an encoder-decoder cannot be a {kind} model here; its encoder would see the tokens it is to judge"
        )
    if not hasattr(config, "relative_attention_num_buckets"):
        fail(f"{name}: of the encoder-decoders only the T5 family is supported, not {config.model_type}")
    return "encoder-decoder" if kind == "policy" else kind


def only_prompts(input_ids, prompt_lengths):
    """The prompts of collated sequences, [B, P], and their attention mask."""
    mask = torch.arange(int(prompt_lengths.max()), device=input_ids.device) < prompt_lengths[:, None]
    return input_ids[:, : mask.shape[1]], mask.long()


def hidden_states(model, input_ids, prompt_lengths, tokens):
    """The decoder's last hidden states [B, T, H] for the response `tokens` [B, T], scaled as its output layer reads them, and the
    encoder's mean over each prompt [B, H]."""
    ids, mask = only_prompts(input_ids, prompt_lengths)
    states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    shifted = torch.cat(
        [torch.full_like(tokens[:, :1], model.config.decoder_start_token_id), tokens[:, :-1]], 1
    )
    seen = dict(encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False)
    hidden = model.get_decoder()(input_ids=shifted, **seen).last_hidden_state
    if getattr(model.config, "scale_decoder_outputs", False):  # T5's tied output layer; Flan-T5 has its own
        hidden = hidden * model.config.d_model**-0.5
    return hidden, (states * mask[..., None]).sum(1) / prompt_lengths[:, None]
