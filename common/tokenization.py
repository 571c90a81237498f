"""Tokenizers, chat templates, stop tokens; rows to token ids."""

import jinja2
import transformers

from common.cli import fail, note
from common.pretrained import load_pretrained


def load_tokenizer(name: str):
    """The tokenizer of a model, with a padding token (its eos where it has none: our masks come from positions)."""
    tokenizer = load_pretrained("tokenizer", transformers.AutoTokenizer, name)
    if tokenizer.eos_token_id is None:
        fail(f"{name}: its tokenizer has no end-of-sequence token, so a response could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = load_pretrained("configuration", transformers.AutoConfig, name)
    tokenizer.of_encoder_decoder = config.is_encoder_decoder  # encode_prompt asks
    return tokenizer


def same_tokenizer(tokenizer, name: str) -> bool:
    """Whether the model `name` reads the policy's tokens as they are."""
    other = load_tokenizer(name)
    return other.get_vocab() == tokenizer.get_vocab() and other.chat_template == tokenizer.chat_template


def require_same_tokenizer(tokenizer, name: str, flag: str) -> None:
    """Ends the run where the model `name`, given by `flag`, does not read the policy's tokens as they are."""
    if not same_tokenizer(tokenizer, name):
        fail(f"{flag} {name}: its tokenizer differs from the policy's; train it on the policy's own")


def encode_prompt(tokenizer, prompt) -> list[int]:
    """Prompt tokens, ready for an answer: through the chat template where there is one, else plain text with one BOS. An encoder
    reads its input with the eos it was trained with, a decoder goes on from the text."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = tokenizer(prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt) + "\n")[
        "input_ids"
    ]
    ended = (
        len(ids) > 1
        and ids[-1] == tokenizer.eos_token_id
        and not getattr(tokenizer, "of_encoder_decoder", False)
    )
    return ids[:-1] if ended else ids


def stop_token(tokenizer) -> int:
    """The token that ends an answer: what the chat template writes after one (Gemma's is not its eos), else eos."""
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zq"}]
        tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("zq")[2].strip()
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
            return ids[0]
    return tokenizer.eos_token_id


def tokenize(rows, tokenizer, fields, max_prompt_length, max_response_length, name) -> list[dict]:
    """Adds `prompt_ids` and, ended by the stop token, `<field>_ids`. Long prompts are dropped, long answers cut; both counted."""
    kept, cut, stop = [], 0, stop_token(tokenizer)
    for row in rows:
        try:
            ids = {"prompt_ids": encode_prompt(tokenizer, row["prompt"])}
        except jinja2.TemplateError as error:
            fail(f"{name}, row {row.get('row')}: the model's chat template refuses the prompt ({error})")
        if len(ids["prompt_ids"]) <= max_prompt_length:
            for field in fields:
                answer = tokenizer(row[field], add_special_tokens=False)["input_ids"] + [stop]
                cut += len(answer) > max_response_length
                ids[f"{field}_ids"] = answer[:max_response_length]
            kept.append({**row, **ids})
    if len(kept) < len(rows):
        dropped = f"dropped {len(rows) - len(kept)} of {len(rows)} rows"
        note(f"{name}: {dropped}: prompt longer than --max-prompt-length {max_prompt_length}")
    if cut:
        note(f"{name}: cut {cut} responses at --max-response-length {max_response_length}")
    return kept or fail(
        f"{name}: no usable row: every prompt is longer than --max-prompt-length {max_prompt_length}"
    )
