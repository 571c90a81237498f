"""How long a sequence a model reads: beyond its positions some models fail, others write nonsense."""

import torch

from common.cli import fail

# Kinds of RoPE whose angles depend on the longest sequence of a batch once that is longer than the original
# limit: a log-probability would change with a row's neighbours, and differ between sampling and training.
OF_THE_BATCH = ("longrope", "dynamic")


def limit(model) -> tuple[int | None, str]:
    """(how many tokens a model reads, '' or why no more) by its configuration and its own tables; None where
    nothing limits them (recurrent layers, ALiBi, relative positions). `model` needs no weights."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest <= 0:
        longest = None
    why = ""
    for rope in rope_settings(config):
        original = rope.get("original_max_position_embeddings") or longest
        kind = rope.get("rope_type", "default")
        if original is None or kind == "default":
            continue
        if kind in OF_THE_BATCH:
            longest = min(longest or original, original)
            why = f", as its {kind} RoPE gives a token other angles where a text beside it is longer"
        elif not why:
            longest = max(longest or 0, int(original * (rope.get("factor") or 1)))
    rows = table_rows(model)
    if rows is not None and (longest is None or rows < longest):
        longest = rows
    return longest, why


def rope_settings(config) -> list[dict]:
    """The settings of RoPE, of each kind of layer where they differ."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [each for each in found.values() if isinstance(each, dict)]
    return kinds or [found]


def table_rows(model) -> int | None:
    """The usable rows of the smallest table of absolute positions, None where there is none.

    Tables of pictures and sounds in the same model are no tables of text.
    """
    is_text = model.config.get_text_config() is model.config
    text = model if is_text or model.config.is_encoder_decoder else model.get_decoder()
    found = []
    for name, module in text.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding) and last in (
            "wpe",
            "embed_positions",
            "position_embeddings",
        ):
            first = getattr(module, "offset", 0)  # OPT's kind
            if (
                module.padding_idx is not None
            ):  # RoBERTa's kind: positions are counted from after the padding's
                first = max(first, module.padding_idx + 1)
            found.append(module.num_embeddings - first)
        for buffer_name, buffer in module.named_buffers(recurse=False):
            if buffer_name == "embed_positions" and buffer.ndim == 2:  # GPT-J's kind: angles computed once
                found.append(buffer.shape[0])
    return min(found, default=None)


def longest_of(sequences, prompts=(), response_length: int = 0) -> int:
    """The tokens of the longest (prompt, response), or of the longest of `prompts` with a response of
    `response_length`."""
    written = max((len(prompt) + len(response) for prompt, response in sequences), default=0)
    sampled = max((len(prompt) for prompt in prompts), default=-response_length) + response_length
    return max(written, sampled)


def check(model, name: str, longest: int) -> None:
    """Ends with one line where a sequence of `longest` tokens is beyond the model's positions."""
    found, why = limit(model)
    if found is not None and longest > found:
        fail(
            f"{name}: sequences have up to {longest} tokens, and a {model.config.model_type} model reads "
            f"{found}{why}: lower --max-prompt-length or --max-response-length"
        )
