"""Tokenizers, stop tokens; rows to token ids."""

import os
from pathlib import Path

import transformers

from common import templates
from common.cli import fail, note
from common.pretrained import load_pretrained

# what `tokenize` adds to a row: no columns of the data
TOKENS = ("opening_ids", "prompt_ids", "response_ids", "chosen_ids", "rejected_ids")


def load_tokenizer(
    name: str, arguments: dict[str, str] | None = None, ends: bool = True
) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model, a folder or hub id, with a padding token.

    Where it has none, that is its eos, which harms nothing, as our masks come from positions. Ends with one
    line where it has no end-of-sequence token, or an empty chat template. `ends`: whether the caller asks how
    an answer ends; of a reward model that reads text nobody does. `arguments` are the chat template's
    (--template-arguments).
    """
    tokenizer = load_pretrained("tokenizer", transformers.AutoTokenizer, name)
    if ends or tokenizer.pad_token_id is None:
        require_end(tokenizer, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if isinstance(tokenizer.chat_template, str) and not tokenizer.chat_template.strip():
        fail(
            f"{name}: its chat template is empty: write it anew, or remove chat_template.jinja for plain text"
        )
    templates.prepare(tokenizer, arguments or {}, name)
    config = load_pretrained("configuration", transformers.AutoConfig, name)
    tokenizer.embeddings = getattr(config.get_text_config(), "vocab_size", None)  # encode asks
    tokenizer.of_encoder_decoder = config.is_encoder_decoder  # encode_prompt asks
    tokenizer.generation_ends = generation_ends(tokenizer, name, config) if ends else []
    return tokenizer


def require_end(tokenizer, name: str) -> None:
    """Ends with one line where a tokenizer has no end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        fail(f"{name}: its tokenizer has no end-of-sequence token, so a response could never end")


def generation_ends(tokenizer, name: str, config) -> list[int]:
    """The tokens by which the model's generation_config.json (without one: its config) ends an answer.

    Those that are ordinary text to its tokenizer are left out, and named: a configuration that was made for
    another tokenizer would cut answers anywhere.
    """
    try:
        ends = transformers.GenerationConfig.from_pretrained(name).eos_token_id
    except Exception as error:
        if Path(name, "generation_config.json").exists() or not isinstance(error, OSError):
            fail(f"{name}: its generation_config.json cannot be read ({type(error).__name__})")
        ends = config.get_text_config().eos_token_id
    if ends is None:
        return []
    special = special_tokens(tokenizer)
    found = []
    ends = ends if isinstance(ends, list) else [ends]
    if not all(isinstance(token, int) for token in ends):
        fail(
            f"{name}: eos_token_id {ends} of its generation_config.json is neither a token nor a list of them"
        )
    for token in ends:
        if token in special:
            found.append(token)
        else:
            text = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else "no token"
            note(
                f"{name}: its generation config ends answers by {token} ({text!r}), which is no special token "
                "of its tokenizer; here it does not"
            )
    return found


def special_tokens(tokenizer) -> set[int]:
    """The tokens that are not made of text."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def stop_tokens(tokenizer) -> list[int]:
    """All tokens that end a sampled answer: the template's, eos, and those of the generation config."""
    return sorted({stop_token(tokenizer), tokenizer.eos_token_id, *getattr(tokenizer, "generation_ends", ())})


def were_cut(tokenizer, responses: list[list[int]]) -> list[bool]:
    """Which responses do not end with a token that ends an answer: they were cut at their longest length."""
    stops = stop_tokens(tokenizer)
    return [not response or response[-1] not in stops for response in responses]


def same_tokenizer(tokenizer, name: str) -> bool:
    """Whether the model `name` reads the policy's tokens as they are."""
    other = load_tokenizer(name, ends=False)
    return other.get_vocab() == tokenizer.get_vocab() and other.chat_template == tokenizer.chat_template


def require_same_tokenizer(tokenizer, name: str, flag: str) -> None:
    """Ends the run where the model `name`, given by `flag`, does not read the policy's tokens as they are."""
    if not same_tokenizer(tokenizer, name):
        fail(f"{flag} {name}: its tokenizer differs from the policy's; train it on the policy's own")


def encode(tokenizer, text: str) -> list[int]:
    """The tokens of a text in which everything is written that is to be read: BOS, ends. Raises ValueError where
    one of them is none of the model's."""
    return embedded(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def embedded(tokenizer, ids: list[int]) -> list[int]:
    """`ids`, all of which the model has an embedding of: some tokenizers have tokens for pictures that a model of
    text does not know. Raises ValueError."""
    rows = getattr(tokenizer, "embeddings", None)
    if rows is not None and ids and max(ids) >= rows:
        word = tokenizer.convert_ids_to_tokens(max(ids))
        raise ValueError(f"it holds {word!r}, token {max(ids)}, and the model has {rows} embeddings")
    return ids


def encode_prompt(tokenizer, prompt: str | list[dict], tools: list | None = None) -> list[int]:
    """Prompt tokens, ready for an answer: by the chat template where there is one, else plain text with one
    BOS. Raises ValueError where the template refuses the prompt.

    Messages without a template are joined by line ends. An encoder reads its input with the eos it was
    trained with; a decoder goes on from the text, so an eos that its tokenizer appends is taken off.
    """
    if tokenizer.chat_template:
        return encode(tokenizer, templates.opening(tokenizer, prompt, tools))
    if tools:
        raise ValueError("the model has no chat template, by which tools are written")
    return without_eos(tokenizer, embedded(tokenizer, tokenizer(prompt_text(prompt))["input_ids"]))


def without_eos(tokenizer, ids: list[int]) -> list[int]:
    """Without the eos that some tokenizers append; an encoder's stays."""
    of_encoder = getattr(tokenizer, "of_encoder_decoder", False)
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not of_encoder:
        return ids[:-1]
    return ids


def encode_answer(
    tokenizer,
    prompt: str | list[dict],
    answer: str | list[dict],
    tools: list | None = None,
    truncated: bool = False,
) -> tuple[list[int], list[int], list[int]]:
    """(prompt tokens, answer tokens with their end, what the template writes after that). A `truncated` answer
    has neither an end nor anything after it.

    The three together are the tokens of the template's own rendering of the conversation; a token that holds
    text of both prompt and answer is the answer's. Raises ValueError where the template refuses the
    conversation or leaves out a part of the answer, or where that holds the text of a token that ends it.
    """
    refuse_special_texts(tokenizer, answer)
    if not tokenizer.chat_template:
        prompt_ids, answer_ids = encode_plain(tokenizer, prompt, answer)
        end = [] if truncated else [tokenizer.eos_token_id]
        return prompt_ids, answer_ids + end, []
    written = templates.write(tokenizer, prompt, answer, tools)
    if truncated:
        written = written._replace(end="", rest="")
    ids = encode(tokenizer, written.before + written.answer + written.end)
    start = len(os.path.commonprefix([encode(tokenizer, written.before), ids]))
    answer_ids = ids[start:]
    if not written.end and not truncated:
        answer_ids.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id
    if pad in answer_ids and pad not in stop_tokens(tokenizer):
        raise ValueError("the model's chat template writes the padding token into the answer")
    return ids[:start], answer_ids, encode(tokenizer, written.rest)


def encode_plain(tokenizer, prompt, answer: str | list[dict]) -> tuple[list[int], list[int]]:
    """(prompt tokens, answer tokens) without a chat template: those of one text, where that begins with the
    prompt's tokens; else, as an encoder-decoder's, those of each."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    text = answer if isinstance(answer, str) else prompt_text(answer).strip()
    if not getattr(tokenizer, "of_encoder_decoder", False):
        ids = without_eos(tokenizer, embedded(tokenizer, tokenizer(prompt_text(prompt) + text)["input_ids"]))
        if ids[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, ids[len(prompt_ids) :]
    return prompt_ids, encode(tokenizer, text)


def refuse_special_texts(tokenizer, answer: str | list[dict]) -> None:
    """Raises ValueError where a text of the answer holds the text of a token that ends it, pads or begins."""
    roles = (tokenizer.bos_token_id, tokenizer.pad_token_id, *stop_tokens(tokenizer))
    words = {tokenizer.convert_ids_to_tokens(token) for token in roles if token is not None}
    messages = [{"content": answer}] if isinstance(answer, str) else answer
    for message in messages:
        for word in words:
            if isinstance(message.get("content"), str) and word in message["content"]:
                raise ValueError(
                    f"the answer holds {word!r}, which would be a special token of the model and no text"
                )


def without_end(tokenizer, answer: str | list[dict]) -> str | list[dict]:
    """A text without the end token that it was written with, as texts are that were rendered before."""
    if not isinstance(answer, str):
        return answer
    stripped = answer.rstrip()
    for token in stop_tokens(tokenizer):
        word = tokenizer.convert_ids_to_tokens(token)
        if stripped.endswith(word):
            return stripped.removesuffix(word)
    return answer


def prompt_text(prompt: str | list[dict]) -> str:
    """A prompt without a chat template: messages are joined by line ends."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt) + "\n"


def stop_token(tokenizer) -> int:
    """The token that ends an answer: what the chat template writes after one (Gemma: not its eos), else
    eos."""
    if tokenizer.chat_template:
        end, _ = templates.split_tail(tokenizer, templates.tail_of(tokenizer))
        if end:
            return tokenizer.convert_tokens_to_ids(end.strip())
    return tokenizer.eos_token_id


def tokenize(
    rows: list[dict],
    tokenizer,
    fields: tuple[str, ...],
    max_prompt_length: int,
    max_response_length: int,
    name: str,
    skip_bad_rows: bool = False,
    *,
    whole: bool = False,
) -> list[dict]:
    """The rows with tokens: `opening_ids`, which a sampled answer continues; `prompt_ids`, what stands before
    the answers of `fields`; and `<field>_ids`, each ended by the stop token, except a `response` whose row says
    that it is `truncated`.

    The last two are the template's own rendering, so a template may write another prompt before an answer
    than it opens (`<think>`). `whole`: with what it writes after the end, as reward models read it. Long
    prompts are dropped, long answers cut; both are counted in a note. Ends with one line where no row is
    left, or a row cannot be written (`skip_bad_rows` drops and counts those). `name`: the data set, for these
    lines.
    """
    kept = []
    bad = cut = ended = unended = 0
    for row in rows:
        answers = {field: without_end(tokenizer, row[field]) for field in fields}
        try:
            ids = row_ids(tokenizer, row, answers, whole)
        except ValueError as error:
            if not skip_bad_rows:
                fail(f"{name}, row {row.get('row')}: {error} (or drop such rows with --skip-bad-rows)")
            bad += 1
            continue
        if max(len(ids["opening_ids"]), len(ids["prompt_ids"])) > max_prompt_length:
            continue
        for field in fields:
            cut += len(ids[f"{field}_ids"]) > max_response_length
            ids[f"{field}_ids"] = ids[f"{field}_ids"][:max_response_length]
            ended += answers[field] != row[field]
            unended += is_truncated(row, field)
        kept.append({**row, **answers, **ids})
    require_known_words(tokenizer, kept, name)
    if bad:
        note(f"{name}: dropped {bad} bad rows of {len(rows)}")
    if len(kept) + bad < len(rows):
        dropped = f"dropped {len(rows) - len(kept) - bad} of {len(rows)} rows"
        note(f"{name}: {dropped}: prompt longer than --max-prompt-length {max_prompt_length}")
    if unended:
        note(f"{name}: {unended} answers get no end token, since their rows say that they are truncated")
    if ended:
        note(f"{name}: {ended} answers end with the text of an end token, which is not written twice")
    if cut:
        share = 100 * cut / (len(kept) * len(fields))
        note(f"{name}: cut {cut} answers ({share:.0f} %) at --max-response-length {max_response_length}")
    if not kept:
        fail(f"{name}: no usable row: every prompt is longer than --max-prompt-length {max_prompt_length}")
    return kept


def require_known_words(tokenizer, rows: list[dict], name: str) -> None:
    """Ends with one line where the tokenizer knows less than half of a text, and says where it misses some."""
    unknown = tokenizer.unk_token_id
    ids = [token for row in rows for key, ids in row.items() if key.endswith("_ids") for token in ids]
    share = ids.count(unknown) / max(1, len(ids)) if unknown is not None else 0.0
    if share > 0.5:
        fail(
            f"{name}: {100 * share:.0f} % of its tokens are unknown to the model's tokenizer; give its --model"
        )
    if share > 0.05:
        note(f"{name}: {100 * share:.0f} % of its tokens are unknown to the model's tokenizer")


def is_truncated(row: dict, field: str) -> bool:
    """Whether an answer is one that the length limit cut when it was sampled, as rollouts.jsonl and scored.jsonl
    say of their responses."""
    return field == "response" and row.get("truncated") is True


def row_ids(tokenizer, row: dict, answers: dict, whole: bool) -> dict[str, list[int]]:
    """The tokens of one row, see `tokenize`; `answers` by field. Raises ValueError."""
    tools = row.get("tools")
    opening_ids = encode_prompt(tokenizer, row["prompt"], tools)
    encoded = {}
    for field, answer in answers.items():
        truncated = is_truncated(row, field)
        encoded[field] = encode_answer(tokenizer, row["prompt"], answer, tools, truncated)
    # of a pair, a template may begin the two answers differently: what is common is the prompt
    prompts = [prompt_ids for prompt_ids, _, _ in encoded.values()]
    prompt_ids = os.path.commonprefix(prompts) if prompts else opening_ids
    ids = {"opening_ids": opening_ids, "prompt_ids": prompt_ids}
    for field, (own_prompt_ids, answer_ids, rest) in encoded.items():
        begun = own_prompt_ids[len(prompt_ids) :]
        ids[f"{field}_ids"] = begun + answer_ids + (rest if whole else [])
    return ids
