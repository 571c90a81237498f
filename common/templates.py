"""What a chat template writes: a conversation, and where an answer begins and ends in it.

A model reads what its template writes, and nothing that was put together otherwise. So a prompt with its
answer is the template's own rendering of the whole conversation, cut where the answer begins: templates of
thinking models do not write before an answer what they write to ask for one.
"""

import datetime
import functools
import json
import os
import re
from typing import NamedTuple

from common.cli import fail, note

# An answer that no template contains, by which is found what a template writes around one.
PROBE = "zq"
# What a template that writes the day writes on every day, so that a run is tomorrow what it is today.
DAY = datetime.datetime(2024, 7, 26)
DAY_OF = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
# Where messages keep thoughts, beside their content.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class Written(NamedTuple):
    """A conversation as the template writes it: its rendering in four pieces."""

    before: str
    """what a sampled answer continues, as far as the template writes that before an answer, too"""
    answer: str
    """the answer, with what the template puts before it (an empty thought, the name of a channel)"""
    end: str
    """the special token that ends an answer, with the space before it; '' where the template writes none"""
    rest: str
    """what follows (ChatML's line feed)"""


def prepare(tokenizer, arguments: dict[str, str], name: str) -> None:
    """Sets `tokenizer.template_arguments`, which every rendering gets, and says where it
    would write today's date. Ends with one line where the template of the model `name` has no such argument."""
    tokenizer.template_arguments = {}
    template = tokenizer.chat_template or ""
    text = " ".join(template.values()) if isinstance(template, dict) else template
    for key, value in arguments.items():
        if not re.search(rf"\b{re.escape(key)}\b", text):
            fail(f"--template-arguments {key}: the chat template of {name} has no such variable")
        tokenizer.template_arguments[key] = value_of(value)
    if DAY_OF.search(text):
        note(f"{name}: its chat template writes the day; here it is always {DAY.day} {DAY:%B %Y}")


@functools.lru_cache(maxsize=16)
def on_one_day(template: str) -> str:
    """A template that writes `DAY` where it would write today."""
    return DAY_OF.sub(lambda found: json.dumps(DAY.strftime(found[2])), template)


def value_of(text: str):
    """An argument of the command line: true, a number, a list, ... where it is one, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """A text is one message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def is_prefilled(prompt: str | list[dict]) -> bool:
    """Whether a prompt ends with the beginning of the answer."""
    return not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"


def with_answer(prompt: str | list[dict], answer: str | list[dict]) -> list[dict]:
    """The whole conversation; an answer to a prefilled prompt goes on in its last message."""
    messages = as_messages(prompt)
    reply = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if is_prefilled(prompt):
        begun = messages[-1]
        joined = {**begun, **reply[0], "content": begun["content"] + (reply[0].get("content") or "")}
        return [*messages[:-1], joined, *reply[1:]]
    return [*messages, *reply]


def render(tokenizer, messages: list[dict], tools: list | None = None, **options) -> str:
    """The template's text of a conversation. Raises ValueError with the template's reason against it."""
    options |= getattr(tokenizer, "template_arguments", {})
    try:
        template = on_one_day(tokenizer.get_chat_template(None, tools))
        return tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, tokenize=False, **options
        )
    # what templates raise themselves, and what they run into: a division by 0, a recursion without end, messages
    # that they were not made for
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"the model's chat template refuses it: {lines[0]}") from None


def opening(tokenizer, prompt: str | list[dict], tools: list | None = None) -> str:
    """What a sampled answer continues: the conversation with the template's generation prompt, or with the
    beginning of the answer. Raises ValueError where a message or the tools are left out."""
    messages = as_messages(prompt)
    prefilled = is_prefilled(prompt)
    text = render(
        tokenizer, messages, tools, add_generation_prompt=not prefilled, continue_final_message=prefilled
    )
    pressed = without_spaces(text)
    for message in messages:
        content = message.get("content")
        asks = message["role"] not in ("assistant", "tool")  # thoughts are dropped, results written as JSON
        if asks and isinstance(content, str) and without_spaces(content) not in pressed:
            raise ValueError(f"the model's chat template leaves out the {message['role']} message")
    missing = [name for name in names_of(tools or []) if name not in text]
    if missing:
        raise ValueError(f"the model's chat template leaves out the tool {missing[0]!r}")
    return text


def names_of(functions: list[dict]) -> list[str]:
    """The names in a list of tools, or of calls of tools."""
    found = [function.get("function", function) for function in functions]
    return [each["name"] for each in found if isinstance(each, dict) and "name" in each]


def text_of(answer: str | list[dict]) -> str:
    """What an answer says, of messages all of them: for lengths, and for what reads text alone."""
    if isinstance(answer, str):
        return answer
    return "\n".join(message["content"] for message in answer)


def without_spaces(text: str) -> str:
    """Templates add spaces and line feeds, and take them off."""
    return re.sub(r"\s", "", text)


def write(
    tokenizer, prompt: str | list[dict], answer: str | list[dict], tools: list | None = None
) -> Written:
    """The rendering of a prompt with its answer, which is a text or messages.

    Where the template leaves out a part of a text (some keep no thoughts), the answer continues the opening
    instead, as a sampled one does. Raises ValueError where the template refuses the conversation, or a part
    of messages would be lost.
    """
    start = opening(tokenizer, prompt, tools)
    full = render(tokenizer, with_answer(prompt, answer), tools)
    before = start if full.startswith(start) else shared_opening(tokenizer, prompt, tools, start, full)
    tail = tail_of(tokenizer)
    if not full.endswith(tail):  # another end than a text has: calls of tools, for one
        tail = special_tail(tokenizer, full)
    body = full[len(before) : len(full) - len(tail)]
    lost = lost_part(answer, body)
    if lost:  # or the opening has written its beginning
        lost = lost_part(answer, generation_prompt(tokenizer, prompt, start, tools) + body)
    if lost:
        if not isinstance(answer, str) or is_prefilled(prompt):
            raise ValueError(f"the model's chat template leaves out a part of the answer: {lost[:60]!r}")
        body = continuation(answer, opened=start[len(before) :])
        before = start
    end, rest = split_tail(tokenizer, tail)
    return Written(before, body, end, rest)


def shared_opening(tokenizer, prompt, tools: list | None, start: str, full: str) -> str:
    """The part of the opening `start` that the template also writes before the answer in `full`. Raises
    ValueError where it writes the prompt itself otherwise.

    The opening may begin a thought that a plain answer does not have (DeepSeek R1), or end one that an answer
    with thoughts fills (Qwen3.5). So it is cut before the tag that begins it.
    """
    plain = render(tokenizer, with_answer(prompt, PROBE), tools).rpartition(PROBE)[0]
    before = os.path.commonprefix([start, plain])
    asked = len(start) - len(generation_prompt(tokenizer, prompt, start, tools))
    while not full.startswith(before):
        tag = before.rfind("<", asked)
        if tag < 0:
            raise ValueError("the model's chat template writes the prompt otherwise before an answer")
        before = before[:tag]
    return before


def judged(tokenizer, prompt: str | list[dict], answer: str, tools: list | None, cut: bool) -> str:
    """The rendering of a finished conversation, as reward models read it; of an answer that was `cut` without
    the end that it did not write."""
    full = render(tokenizer, with_answer(prompt, answer), tools)
    if not cut:
        return full
    tail = tail_of(tokenizer)
    return full.removesuffix(tail if full.endswith(tail) else special_tail(tokenizer, full))


def generation_prompt(tokenizer, prompt, start: str, tools: list | None) -> str:
    """What the template writes after a prompt to ask for an answer; it may begin that (<think>)."""
    if is_prefilled(prompt):
        return ""
    return start.removeprefix(render(tokenizer, as_messages(prompt), tools))


def lost_part(answer: str | list[dict], body: str) -> str:
    """A text of the answer that is not in what the template has written; '' where all are."""
    messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    pressed = without_spaces(body)
    for message in messages:
        if message["role"] == "tool":
            continue  # written as JSON by some
        texts = [message.get(key) for key in ("content", *THOUGHTS)]
        texts += names_of(message.get("tool_calls") or [])
        for text in texts:
            if isinstance(text, str) and without_spaces(text) not in pressed:
                return text
    return ""


def continuation(answer: str, opened: str) -> str:
    """An answer after an opening that may have begun it (`opened`: <think> and a line feed)."""
    stripped = answer.lstrip()
    if opened.strip() and stripped.startswith(opened.strip()):
        return stripped[len(opened.strip()) :].lstrip()
    return answer


# --- ends ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def tail_of(tokenizer) -> str:
    """What the template writes after the text of an answer."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        return render(tokenizer, chat).rpartition(PROBE)[2]
    except ValueError as error:
        fail(f"{tokenizer.name_or_path}: a question and its answer: {error}")


def special_texts(tokenizer) -> list[str]:
    """The texts of the tokens that are not made of text, the longest first."""
    ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted(tokenizer.convert_ids_to_tokens(sorted(ids)), key=len, reverse=True)


def split_tail(tokenizer, tail: str) -> tuple[str, str]:
    """(the first special token with the space before it, what follows) of what is written after an answer;
    ('', all of it) where that begins with something else."""
    stripped = tail.lstrip()
    for text in special_texts(tokenizer):
        if stripped.startswith(text):
            length = len(tail) - len(stripped) + len(text)
            return tail[:length], tail[length:]
    return "", tail


def special_tail(tokenizer, full: str) -> str:
    """The last special token of a conversation and the space after it; '' where it does not end so."""
    stripped = full.rstrip()
    for text in special_texts(tokenizer):
        if stripped.endswith(text):
            return full[len(stripped) - len(text) :]
    return ""
