"""Tokenizers, chat templates, stop tokens; rows to token ids."""

import jinja2
import transformers

from common.cli import fail, note
from common.pretrained import load_pretrained


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model, a folder or hub id, with a padding token.

    Where it has none, that is its eos, which harms nothing, as our masks come from positions. Ends with one
    line where it has no end-of-sequence token.
    """
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


def encode_prompt(tokenizer, prompt: str | list[dict]) -> list[int]:
    """Prompt tokens, ready for an answer: by the chat template where there is one, else plain text with one
    BOS.

    Messages without a template are joined by line ends. An encoder reads its input with the eos it was
    trained with; a decoder goes on from the text, so an eos that its tokenizer appends is taken off.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if isinstance(prompt, str):
        text = prompt
    else:
        text = "\n".join(message["content"] for message in prompt) + "\n"
    ids = tokenizer(text)["input_ids"]
    of_encoder = getattr(tokenizer, "of_encoder_decoder", False)
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not of_encoder:
        return ids[:-1]
    return ids


def stop_token(tokenizer) -> int:
    """The token that ends an answer: what the chat template writes after one (Gemma: not its eos), else
    eos."""
    if tokenizer.chat_template:
        # the template's rendering of an answer "zq", which no template contains: what follows it is the end
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "zq"}]
        tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("zq")[2].strip()
        ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        if ids and ids[0] in special:
            return ids[0]
    return tokenizer.eos_token_id


def tokenize(
    rows: list[dict],
    tokenizer,
    fields: tuple[str, ...],
    max_prompt_length: int,
    max_response_length: int,
    name: str,
) -> list[dict]:
    """The rows with `prompt_ids` and, ended by the stop token, `<field>_ids` of each of `fields`.

    Long prompts are dropped, long answers cut; both are counted in a note. Ends with one line where no row is
    left, or where the chat template refuses a prompt. `name`: the data set, for these lines.
    """
    stop = stop_token(tokenizer)
    kept = []
    cut = 0
    for row in rows:
        try:
            prompt_ids = encode_prompt(tokenizer, row["prompt"])
        except jinja2.TemplateError as error:
            fail(f"{name}, row {row.get('row')}: the model's chat template refuses the prompt ({error})")
        if len(prompt_ids) > max_prompt_length:
            continue
        ids = {"prompt_ids": prompt_ids}
        for field in fields:
            answer = tokenizer(row[field], add_special_tokens=False)["input_ids"] + [stop]
            if len(answer) > max_response_length:
                cut += 1
            ids[f"{field}_ids"] = answer[:max_response_length]
        kept.append({**row, **ids})
    if len(kept) < len(rows):
        dropped = f"dropped {len(rows) - len(kept)} of {len(rows)} rows"
        note(f"{name}: {dropped}: prompt longer than --max-prompt-length {max_prompt_length}")
    if cut:
        note(f"{name}: cut {cut} responses at --max-response-length {max_response_length}")
    if not kept:
        fail(f"{name}: no usable row: every prompt is longer than --max-prompt-length {max_prompt_length}")
    return kept
