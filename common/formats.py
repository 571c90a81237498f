"""The field's formats as rows of ours: conversations, pairs with a choice, answers with scores.

`ours(row, kind)` gives the rows that one row of a file holds: with `prompt` and, by kind, `response`, `chosen`
and `rejected`, `reward` or `label`. A format is known by the types and the names of its columns; what is only
half of one raises ValueError, with the reason.
"""

import json
import math
import re

from common.templates import THOUGHTS

# the names that roles have in files, and in chat templates
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
} | {role: role for role in ("system", "developer", "user", "assistant", "tool")}
CONVERSATIONS = ("messages", "conversations", "conversation")  # columns that hold whole conversations
SYSTEM = ("system", "system_prompt")  # columns that hold a system message
# keys that a row has on its way: the whole conversation, and how many of its messages are a given prompt
WHOLE = "_conversation"
GIVEN = "_given"
ON_THE_WAY = (WHOLE, GIVEN)
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
SCORES += (("chosen_rating", "rejected_rating"),)
# (column of one side, of the other, of the choice, what it says where the first is better, where the second is)
CHOICES = (
    ("response_0", "response_1", "better_response_id", (0,), (1,)),
    ("response1", "response2", "overall_preference", (-3, -2, -1), (1, 2, 3)),
    ("response_1", "response_2", "preference_strength", (-3, -2, -1), (1, 2, 3)),
    ("conversation_a", "conversation_b", "winner", ("model_a",), ("model_b",)),
    ("response_a", "response_b", "winner", ("model_a", "a", "A"), ("model_b", "b", "B")),
    ("response_a", "response_b", "winner_model_a", (1, True), (0, False)),
    ("human_ref_A", "human_ref_B", "labels", (1,), (0,)),
)
CONTEXTS = ("context", "history", "question")  # columns that hold the prompt of a row with a choice
# The columns that are read as conversations. All others are the reward functions', as the file has them.
READ = {"prompt", "response", "chosen", "rejected", *CONVERSATIONS, *CONTEXTS}
READ |= {side for first, second, *_ in CHOICES for side in (first, second)}
# Of these the ones that may hold messages as JSON in a text; an answer of JSON is an answer.
JSON_TEXTS = {"prompt", *CONVERSATIONS, *CONTEXTS, "conversation_a", "conversation_b"}
HH = re.compile(r"\n\n(Human|Assistant): ?")


def ours(row: dict, kind: str) -> list[dict]:
    """The rows of ours that a row holds; [] where it teaches nothing of this kind (a tie). Raises ValueError."""
    row = {column: value for column, value in row.items() if value is not None}
    row = with_parsed(row)
    if kind == "best_of":
        return of_best_of(row)
    has_own_answer = {"response", "chosen", "rejected", "reward"} & set(row)  # --columns may have named one
    if is_ultrafeedback(row) and not has_own_answer:
        return of_ultrafeedback(row, kind)
    if is_ranked(row) and not has_own_answer:
        return of_ranked(row, kind)
    if kind == "preference" and is_list_of_answers(row.get("chosen")):
        raise ValueError(
            "chosen is a list of answers, as in RewardBench 2, and not one; --source best-of reads it"
        )
    row = with_pair(row, kind)
    if row is None:
        return []
    if kind == "scored" and "reward" not in row and (rows := of_scored_pair(row)):
        return rows
    is_pair = is_conversation(row.get("chosen")) and is_conversation(row.get("rejected"))
    if kind == "preference" or (kind == "prompts" and is_pair and "prompt" not in row):
        pair = with_shared_prompt(row)
        return [] if pair is None else [pair]
    return [with_prompt(row, kind)]


# --- messages -----------------------------------------------------------------------------------------------


def is_messages(value) -> bool:
    """A list of messages, at least one: of `role` and `content`, of `from` and `value`, or of two speakers in
    each (Capybara)."""
    if not isinstance(value, list) or not value:
        return False
    forms = ({"role"}, {"from", "value"}, {"input", "output"}, {"human", "assistant"})
    return all(isinstance(message, dict) and any(form <= set(message) for form in forms) for message in value)


def as_messages(value: list[dict]) -> list[dict]:
    """Messages with `role`, `content` and what else they hold. Raises ValueError at an unknown role, or at
    content that is no text."""
    messages = []
    for message in value:
        message = {key: each for key, each in message.items() if each is not None}
        for speaker, listener in (("input", "output"), ("human", "assistant")):
            if {speaker, listener} <= set(message) and "role" not in message:
                messages.append({"role": "user", "content": message[speaker]})
                messages.append({"role": "assistant", "content": message[listener]})
                break
        else:
            role = message.pop("role", None) or message.pop("from", None)
            content = message.pop("content", message.pop("value", None))
            messages.append({"role": role, "content": content, **message})
    return [checked_message(message) for message in messages]


def checked_message(message: dict) -> dict:
    """A message with a role that templates know, and a text. Raises ValueError."""
    role = message["role"]
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"a message has the role {role!r}; use system, user, assistant or tool")
    role = ROLES[role.lower()]
    content = message["content"]
    if "function_call" in message:
        raise ValueError("a message has a `function_call`, which templates do not write; use `tool_calls`")
    if content is None or content == []:
        says_more = any(message.get(key) for key in ("tool_calls", *THOUGHTS))
        if role != "assistant" or not says_more:
            raise ValueError(f"a message of the {role} has no content")
        content = ""
    message = {**message, "role": role, "content": as_text(content)}
    if "tool_calls" in message:
        message["tool_calls"] = with_parsed_arguments(message["tool_calls"])
    return message


def with_parsed_arguments(calls) -> list[dict]:
    """Calls of tools whose arguments are objects: OpenAI's are JSON in a text, which templates would quote once
    more. Raises ValueError."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError("tool_calls is no list of calls")
    parsed = []
    for call in calls:
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise ValueError("a call of a tool has no name")
        arguments = inner.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                raise ValueError("the arguments of a call of a tool are no JSON") from None
            inner = {**inner, "arguments": arguments}
        parsed.append({**call, "function": inner} if "function" in call else inner)
    return parsed


def as_text(content) -> str:
    """The text of a message; parts that are all texts are joined. Raises ValueError where others are among
    them."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = {str(part.get("type")) for part in content}
        if kinds <= {"text"} and all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        raise ValueError(f"a message has content of the kind {sorted(kinds - {'text'})}, and not text alone")
    raise ValueError(f"a message has content of the type {type(content).__name__}, not text")


def from_hh(text: str) -> list[dict] | None:
    """A conversation that is written as HH-RLHF does it, None for any other text."""
    if not HH.match(text):
        return None
    parts = HH.split(text)[1:]  # speaker, text, speaker, text, ...
    messages = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        messages.append({"role": "user" if speaker == "Human" else "assistant", "content": said.strip()})
    if messages[-1] == {"role": "assistant", "content": ""}:  # it asks for an answer
        messages.pop()
    return messages


def from_json(text: str) -> list[dict] | None:
    """Messages that stand as JSON in a text, None for any other text."""
    if not text.lstrip().startswith("[{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not is_messages(value):
        return None
    has_roles = all({"role"} <= set(each) or {"from", "value"} <= set(each) for each in value)
    return value if has_roles else None


def with_parsed(row: dict) -> dict:
    """The columns of `READ` that are conversations in any form, as messages; `tools` from JSON."""
    row = dict(row)
    for column in sorted(READ & set(row)):
        value = row[column]
        if is_messages(value):
            row[column] = as_messages(value)
        elif isinstance(value, str) and (messages := from_hh(value)):
            row[column] = messages
        elif isinstance(value, str) and column in JSON_TEXTS and (messages := from_json(value)):
            row[column] = as_messages(messages)
    if isinstance(row.get("tools"), str):
        try:
            row["tools"] = json.loads(row["tools"]) if row["tools"].strip() else None
        except ValueError:
            raise ValueError("tools is text that is no JSON") from None
    if not row.get("tools"):
        row.pop("tools", None)
    elif not isinstance(row["tools"], list) or not all(isinstance(tool, dict) for tool in row["tools"]):
        raise ValueError("tools is no list of JSON schemas")
    for tool in row.get("tools", []):
        inner = tool.get("function", tool)
        if not isinstance(inner, dict) or not isinstance(inner.get("name", ""), str):
            raise ValueError("a tool's name is no text")
    return row


def is_conversation(value) -> bool:
    """Messages, after `with_parsed`."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


# --- prompts and answers ------------------------------------------------------------------------------------


def with_prompt(row: dict, kind: str) -> dict:
    """The row with `prompt`, and `response` where it has one, from a whole conversation too."""
    for column in CONVERSATIONS:
        whole = row.get(column)
        asks_for_answer = kind != "prompts" and "response" not in row
        if is_conversation(whole) and ("prompt" not in row or asks_for_answer):
            row = {**row, WHOLE: whole}
            if kind == "prompts":
                row["prompt"] = without_last_answer(whole)
            elif "response" in row:  # the answer to a conversation beside it
                row["prompt"] = without_response(whole, row["response"], column)
            else:
                require_answer(whole, column)
                require_prompt_in(whole, row.get("prompt"), column)
                end = last_answer(whole)
                row["prompt"] = whole[:end]
                row["response"] = whole[end:]
    if "prompt" not in row and isinstance(row.get("turns"), list) and row["turns"]:
        row["prompt"] = row["turns"][0]  # MT-bench's questions
    if kind == "sft" and "prompt" not in row and "response" not in row and isinstance(row.get("text"), str):
        raise ValueError(
            "`text` is one text, in which no prompt and answer can be told apart; use `messages`"
        )
    if kind != "prompts" and is_conversation(row.get("response")):
        row = with_answer(row, kind)
    return with_system(row)


def with_answer(row: dict, kind: str) -> dict:
    """The row whose `response` is messages: without those of the prompt. They may be a whole conversation, and of
    SFT several turns, each of which is trained."""
    prompt = row.get("prompt")
    answer = beyond(prompt, row["response"])
    row = {**row, "response": answer}
    if prompt is None and answer[0]["role"] != "assistant":
        require_answer(answer, "response")
        whole = answer
        given = 1
    elif (
        kind == "sft" and prompt and WHOLE not in row and answer[0]["role"] == "assistant" and len(answer) > 1
    ):
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not is_conversation(before) or before[-1]["role"] == "assistant":
            return row
        whole = [*before, *answer]
        given = len(before)
        require_answer(whole, "response")
    else:
        return row
    end = last_answer(whole)
    return {**row, WHOLE: whole, GIVEN: given, "prompt": whole[:end], "response": whole[end:]}


def without_last_answer(messages: list[dict]) -> list[dict]:
    """What a policy is asked: a conversation up to its last message that is no answer."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not end:
        raise ValueError("the conversation has no message of a user")
    return messages[:end]


def require_answer(messages: list[dict], column: str) -> None:
    """Raises ValueError where a conversation does not end with an answer to something."""
    require_last_answer(messages, column)
    if len(messages) < 2:
        raise ValueError(f"{column} has one message; an answer needs something before it")
    if last_answer(messages) == 0:
        raise ValueError(f"{column} has messages of the assistant alone; an answer needs something before it")


def last_answer(messages: list[dict]) -> int:
    """Where the last answer begins: messages of the assistant in a row are one answer."""
    start = len(messages) - 1
    while start and messages[start - 1]["role"] == "assistant":
        start -= 1
    return start


def without_response(messages: list[dict], response, column: str) -> list[dict]:
    """The prompt in a conversation beside a `response`, which may repeat that. Raises ValueError where the
    conversation ends with another answer."""
    if messages[-1]["role"] != "assistant" or not (isinstance(response, str) or is_conversation(response)):
        return messages
    text = response if isinstance(response, str) else response[-1]["content"]
    if len(messages) < 2 or messages[-1]["content"].strip() != text.strip():
        raise ValueError(f"{column} ends with an answer, which is not the one in `response`")
    return messages[:-1]


def require_prompt_in(messages: list[dict], prompt, column: str) -> None:
    """Raises ValueError where a row's prompt is not part of the conversation beside it, which says the same."""
    texts = [message["content"].strip() for message in messages]
    if isinstance(prompt, str) and not any(prompt.strip() in text for text in texts):
        raise ValueError(f"{column} does not hold the prompt that stands beside it")


def has_system(row: dict) -> bool:
    """Whether a column of the row holds a system message."""
    return any(isinstance(row.get(column), str) and row[column].strip() for column in SYSTEM)


def with_system(row: dict) -> dict:
    """A system message in a column of its own comes before the prompt."""
    for column in SYSTEM:
        system = row.get(column)
        if not isinstance(system, str) or not system.strip() or "prompt" not in row:
            continue
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not is_conversation(messages):
            continue
        if messages[0]["role"] != "system":
            row = {**row, "prompt": [{"role": "system", "content": system}, *messages]}
        elif messages[0]["content"].strip() != system.strip():
            raise ValueError(f"the column `{column}` and the conversation hold different system messages")
    return row


def beyond(prompt, messages: list[dict]) -> list[dict]:
    """The answer in messages that may repeat the prompt they answer."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if (
        is_conversation(before)
        and same_messages(messages[: len(before)], before)
        and len(messages) > len(before)
    ):
        return messages[len(before) :]
    return messages


def same_messages(a: list[dict], b: list[dict]) -> bool:
    """Whether two conversations are one, but for space at the ends of their texts."""
    return [said_by(message, strip=True) for message in a] == [said_by(message, strip=True) for message in b]


def said_by(message: dict, strip: bool = False) -> tuple:
    """Who says what in a message, without what files note of it beside that (a time, a language)."""
    content = message["content"].strip() if strip else message["content"]
    return (message["role"], content, *(message.get(key) for key in ("name", "tool_calls", *THOUGHTS)))


# --- pairs --------------------------------------------------------------------------------------------------


def with_pair(row: dict, kind: str) -> dict | None:
    """A row of two answers and a choice, as one with `chosen` and `rejected`; None where it is a tie. Other rows
    as they are."""
    if "chosen" in row or kind not in ("preference", "scored", "prompts"):
        return row
    for first, second, choice, says_first, says_second in CHOICES:
        if not {first, second, choice} <= set(row):
            continue
        said = row[choice]
        names_a_side = said in says_first + says_second
        tied = row.get("winner_tie") in (1, True) or (is_tie(said) and not names_a_side)
        if tied and kind != "prompts":
            return None
        if not names_a_side and not tied:
            raise ValueError(f"{choice} is {said!r}, which names neither side and no tie")
        sides = (first, second) if said in says_first else (second, first)
        row = {**row, "chosen": row[sides[0]], "rejected": row[sides[1]]}
        for context in CONTEXTS:
            if "prompt" not in row and context in row:
                row["prompt"] = row[context]
        return with_rounds(row) if choice == "winner_model_a" else row
    return row


def is_tie(said) -> bool:
    """Whether a choice says that neither side is better: 0, `tie`, `tie (bothbad)`, `both_bad`."""
    if isinstance(said, str):
        return said.lower().startswith(("tie", "both"))
    return said == 0


def with_rounds(row: dict) -> dict:
    """Arena's texts are JSON lists, one text a round: as conversations. Raises ValueError where they are not."""
    columns = ("prompt", "chosen", "rejected")
    try:
        prompts, chosen, rejected = (json.loads(row[column]) for column in columns)
    except (KeyError, TypeError, ValueError):
        raise ValueError("prompt and answers are no JSON lists with a text for each round") from None
    if not all(
        isinstance(texts, list) and len(texts) == len(prompts) for texts in (prompts, chosen, rejected)
    ):
        raise ValueError("prompt and answers do not have a text for each round")
    row = {key: value for key, value in row.items() if key != "prompt"}
    for column, answers in (("chosen", chosen), ("rejected", rejected)):
        messages = []
        for question, answer in zip(prompts, answers, strict=True):
            messages.append({"role": "user", "content": as_text(question)})
            messages.append({"role": "assistant", "content": as_text(answer)})
        row[column] = messages
    return row


def with_shared_prompt(row: dict) -> dict | None:
    """A pair whose sides are whole conversations: what both begin with is the prompt, what follows the answers.
    None where the sides are one and the same. Raises ValueError where a side does not end with an answer, or
    does not begin with the row's own prompt."""
    sides = {side: row.get(side) for side in ("chosen", "rejected")}
    given = row.get("prompt")
    if sides["chosen"] is not None and sides["chosen"] == sides["rejected"]:
        return None
    if not all(is_conversation(side) for side in sides.values()):
        for side, value in sides.items():
            if is_conversation(value):
                require_last_answer(value, side)
                row = {**row, side: beyond(given, value)}
        return with_system(row)
    for side, messages in sides.items():
        require_last_answer(messages, side)
    before = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if is_conversation(before) and before:
        begun = {side: same_messages(messages[: len(before)], before) for side, messages in sides.items()}
        if not any(begun.values()):  # answers alone
            if isinstance(given, str) and any(m["role"] != "assistant" for m in sides["chosen"][:1]):
                raise ValueError("chosen does not begin with the prompt")
            return with_system(row)
        if not all(begun.values()):
            side = next(side for side, is_begun in begun.items() if not is_begun)
            raise ValueError(f"{side} does not begin with the prompt")
    shared = 0
    for a, b in zip(*sides.values(), strict=False):
        if said_by(a) != said_by(b):
            break
        shared += 1
    shortest = min(len(messages) for messages in sides.values())
    if shared == shortest:
        raise ValueError("of chosen and rejected one goes on where the other ends")
    if shared == 0:
        raise ValueError("chosen and rejected do not begin with one prompt")
    if given is None:
        row = {**row, WHOLE: sides["chosen"]}
    row = {**row, "prompt": sides["chosen"][:shared]}
    for side, messages in sides.items():
        row[side] = messages[shared:]
    return with_system(row)


def require_last_answer(messages: list[dict], side: str) -> None:
    """Raises ValueError where a conversation does not end with an answer."""
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{side} ends with a message of the {messages[-1]['role']}, not with an answer")


def of_scored_pair(row: dict) -> list[dict]:
    """Two scored rows of a pair with a score beside each side; [] of any other row."""
    for chosen, rejected in SCORES:
        if {"chosen", "rejected", chosen, rejected} <= set(row):
            pair = with_shared_prompt(row) or with_last_answers(row)
            rest = {key: value for key, value in pair.items() if key not in ("chosen", "rejected")}
            return [
                {**rest, "response": pair["chosen"], "reward": row[chosen]},
                {**rest, "response": pair["rejected"], "reward": row[rejected]},
            ]
    return []


def with_last_answers(row: dict) -> dict:
    """A pair of equal sides with its prompt: of conversations all but the last answer."""
    messages = row["chosen"]
    if not is_conversation(messages):
        return row
    require_answer(messages, "chosen")
    end = last_answer(messages)
    return {**row, "prompt": messages[:end], "chosen": messages[end:], "rejected": messages[end:]}


# --- several answers ----------------------------------------------------------------------------------------


def is_ultrafeedback(row: dict) -> bool:
    """Whether a row has the nesting of openbmb/UltraFeedback, the data of both papers: an `instruction`, and the
    `completions` of several models to it, each with its `response`."""
    completions = row.get("completions")
    return (
        isinstance(row.get("instruction"), str)
        and isinstance(completions, list)
        and all(isinstance(each, dict) and "response" in each for each in completions)
    )


def of_ultrafeedback(row: dict, kind: str) -> list[dict]:
    """`scored` and `responses`: every completion. `preference`: the best rated against the worst, none where they
    tie, as a tie teaches nothing. Else the best rated alone."""
    scored = []
    for completion in row["completions"]:
        scored.append(
            {
                "prompt": row.get("prompt", row["instruction"]),  # --columns may name another
                "response": completion.get("response"),
                "reward": completion.get("overall_score"),
                "policy": completion.get("model"),
            }
        )
    return best_and_worst(scored, kind)


def is_ranked(row: dict) -> bool:
    """Whether a row has Nectar's nesting: a prompt, and `answers` with a rank each, 1 the best."""
    answers = row.get("answers")
    return (
        isinstance(answers, list)
        and bool(answers)
        and all(isinstance(each, dict) and {"answer", "rank"} <= set(each) for each in answers)
    )


def of_ranked(row: dict, kind: str) -> list[dict]:
    """As UltraFeedback's; the reward is the rank, turned around."""
    prompt = row.get("prompt")
    if is_conversation(prompt):
        prompt = [message for message in prompt if message["content"] or message["role"] != "assistant"]
    scored = []
    for each in row["answers"]:
        if is_rated(each["rank"]):
            answer = {"response": each["answer"], "reward": -each["rank"], "policy": each.get("model")}
            scored.append({"prompt": prompt, **answer})
    return best_and_worst(scored, kind)


def is_list_of_answers(value) -> bool:
    """A list of texts, and not the messages of one answer."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def of_best_of(row: dict) -> list[dict]:
    """RewardBench 2's nesting: lists of right answers in `chosen` and of wrong ones in `rejected`. A row for each
    answer, the right ones first: its place `answer` from 0, `right` of all `answers`. Raises ValueError."""
    for side in ("chosen", "rejected"):
        if side not in row:
            raise ValueError(f"no {side!r} among the columns; name yours with --columns {side} YOURS")
        if not is_list_of_answers(row[side]):
            raise ValueError(f"{side} is {type(row[side]).__name__}, not a list of texts with at least one")
    answers = [*row["chosen"], *row["rejected"]]
    right = len(row["chosen"])
    for column, count in (("num_correct", right), ("total_completions", len(answers))):
        if row.get(column, count) != count:
            raise ValueError(f"{column} is {row[column]!r}, and the row has {count}")
    rest = {column: value for column, value in row.items() if column not in ("chosen", "rejected")}
    rows = []
    for i, answer in enumerate(answers):
        place = {"answer": i, "right": right, "answers": len(answers)}
        rows.append(with_system({**rest, "response": answer, **place}))
    return rows


def is_finite_number(value) -> bool:
    """True and False are no numbers here, though Python has them as such."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def is_rated(score) -> bool:
    """Whether an answer among several has a score. Raises ValueError where it has one that is no number."""
    if score is None:
        return False
    if not is_finite_number(score):
        raise ValueError(f"the score of an answer is {repr(score)[:40]}, not a finite number")
    return True


def best_and_worst(scored: list[dict], kind: str) -> list[dict]:
    """What a kind of data set takes of several scored answers to one prompt."""
    if kind in ("scored", "responses"):
        return scored
    rated = [row for row in scored if is_rated(row["reward"])]
    rated.sort(key=lambda row: row["reward"])
    if kind != "preference" or not rated:
        return rated[-1:]
    worst = rated[0]
    best = rated[-1]
    if worst["reward"] >= best["reward"]:
        return []
    pair = {
        "prompt": best["prompt"],
        "chosen": best["response"],
        "rejected": worst["response"],
        "chosen_policy": best["policy"],
        "rejected_policy": worst["policy"],
    }
    return [pair]


# --- every turn of a conversation ---------------------------------------------------------------------------


def turns_of(row: dict, which: str) -> list[dict]:
    """A row for each answer in a row's conversation: the prompt is what stands before it, so that each is written
    as a template writes the last. Not of those that the data gives a `weight` of 0, nor of a given prompt.
    `which`: `all` or `last`. Rows without a conversation as they are. Raises ValueError."""
    conversation = row.get(WHOLE)
    if conversation is None:
        return [row]
    rows = []
    for end in range(max(1, row.get(GIVEN, 1)), len(conversation)):
        begins = conversation[end]["role"] == "assistant" and conversation[end - 1]["role"] != "assistant"
        if not begins or (which == "last" and end != last_answer(conversation)):
            continue
        answer = [conversation[end]]
        for message in conversation[end + 1 :]:
            if message["role"] != "assistant":
                break
            answer.append(message)
        is_trained = {message.get("weight") != 0 for message in answer}
        if len(is_trained) > 1:
            raise ValueError("of messages of the assistant in a row some have a `weight` of 0 and some not")
        if is_trained == {True}:
            rows.append(with_system({**row, "prompt": conversation[:end], "response": answer}))
    return rows


def opening_of(row: dict):
    """The prompt of the first answer of a row's conversation: all its turns belong to one part of the data."""
    conversation = row.get(WHOLE)
    if conversation is None:
        return row.get("prompt")
    end = row.get(GIVEN, 1)
    while end < len(conversation) and (
        conversation[end]["role"] != "assistant" or conversation[end - 1]["role"] == "assistant"
    ):
        end += 1
    return with_system({**row, "prompt": conversation[:end]})["prompt"]
