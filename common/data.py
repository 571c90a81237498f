"""Rows from a hub id or a file: formats, checks, splits by prompt.

Everything here is deterministic in its arguments: every rank holds the same rows, a resumed run needs only
its step number."""

import gzip
import hashlib
import json
import logging
import zlib
from collections import Counter
from pathlib import Path

import datasets

from assets import reviews
from common import formats, templates
from common.cli import fail, note

KINDS = {  # the columns a row must have, by kind of data set
    "prompts": ("prompt",),
    "sft": ("prompt", "response"),
    "preference": ("prompt", "chosen", "rejected"),
    "scored": ("prompt", "response", "reward"),
    "labelled": ("prompt", "response", "label"),
    "responses": ("prompt", "response"),  # all of them, where `sft` takes UltraFeedback's best
    "best_of": ("prompt", "response"),  # of each prompt the right answers, then the wrong ones
}
OURS = (
    "prompt",
    "response",
    "chosen",
    "rejected",
    "reward",
    "label",
    "policy",
    "system",
)  # what --columns may name
ALIASES = {"response": "completion", "reward": "score"}  # names that a file may use without --columns

# Added to --split-seed, so that the hash that orders prompts for one purpose says nothing about another.
EVALUATION_SALT = 1
HOLD_OUT_SALT = 1_000_003

SPLIT_BY = "split_by"  # the column of a row from a conversation that decides its part, see `row_hash`

FEW = 20  # held-out rows of which a mean says little

PARTS = {  # shares of the prompts, by their hash in [0, 1): 2502.16944's 30 / 50 / 20 %
    "sft": (0.0, 0.3),
    "value": (0.3, 0.8),
    "rl": (0.8, 1.0),
    "all": (0.0, 1.0),
}


# --- reading and checking

# it logs what it raises as well, and an error is one line here
datasets.logging.set_verbosity(logging.CRITICAL)


class Unreadable(str):
    """What is no row, and why."""


def read_rows(
    name: str,
    kind: str,
    *,
    split: str = "train",
    columns: dict[str, str] | None = None,
    part: str = "all",
    split_seed: int = 0,
    skip_bad_rows: bool = False,
    train_on: str = "all",
) -> list[dict]:
    """Rows of `kind` (a key of KINDS) from `reviews`, files (.jsonl, .json, .parquet, .gz too; several with
    commas between), a folder or a hub id, `name:configuration` where it has several.

    `split`: the hub's, or the value to keep of a file's `split` column. `columns` maps our names to the
    file's, `instruction+input` joins two. `part` keeps 2502.16944's share of the prompts, by a hash of each:
    disjoint whatever the order. `train_on`: `all`, a row for each answer of a conversation, or the `last`.
    Each row gets `row`, its number in the file from 1. Ends with one line that names the file, the row and
    the remedy; `skip_bad_rows` drops and counts such rows.
    """
    columns = columns or {}
    for unknown in set(columns) - set(OURS):
        fail(f"--columns: {unknown!r} is not a column of ours; use {', '.join(OURS)}")
    rows = []
    counts = Counter()
    for file in [name] if Path(name).exists() else name.split(","):
        found = reviews.rows(kind) if file == "reviews" else read_file(file, split)
        check_columns(file, columns, found)
        numbered = of_split(file, split, list(enumerate(found, 1)))
        for i, row in numbered:
            try:
                held = rows_of(row, kind, columns, train_on)
            except Exception as error:  # ValueError says why; another is of a nesting that nobody thought of
                why = str(error) if isinstance(error, ValueError) else f"unknown nesting ({error!r})"
                if not skip_bad_rows:
                    why = " ".join(why.split())[:300]  # one line
                    fail(f"{file}, row {i}: {why} (or drop such rows with --skip-bad-rows)")
                counts["bad"] += 1
                continue
            counts["rows"] += 1
            counts["nothing"] += not held
            counts["conversations"] += any(SPLIT_BY in each for each in held)
            counts["turns"] += len(held)
            counts["system"] += any(formats.has_system(each) for each in held)
            counts["prefilled"] += any(templates.is_prefilled(each["prompt"]) for each in held)
            counts["several"] += any(has_other_speakers(each, kind) for each in held)
            rows += [{**each, "row": i} for each in held]
    say_counts(name, kind, counts, train_on)
    if kind == "prompts":
        rows = once_per_prompt(name, rows)
    low, high = PARTS[part]
    rows = [row for row in rows if low <= row_hash(row, split_seed) < high]
    if not rows:
        fail(f"{name}: no usable row (part {part!r} of split {split!r})")
    return rows


def check_columns(name: str, columns: dict[str, str], rows: list) -> None:
    """Ends with one line where `--columns` names what no row has: a typo would fall back on another column."""
    there = {column for row in rows if isinstance(row, dict) for column in row}
    for ours, theirs in columns.items():
        for column in theirs.split("+"):
            if column not in there:
                fail(
                    f"--columns {ours} {theirs}: {name} has no column {column!r}; it has {', '.join(sorted(there))}"
                )


def of_split(name: str, split: str, numbered: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
    """The rows of a split, where rows say which they are of; of a file that says nothing, all."""
    if not any(isinstance(row, dict) and row.get("split") is not None for _, row in numbered):
        return numbered
    kept = []
    for i, row in numbered:
        if isinstance(row, dict) and row.get("split") is None:
            kept.append((i, Unreadable("it has no `split`, which other rows have")))
        elif isinstance(row, dict) and not isinstance(row["split"], str):
            kept.append((i, Unreadable(f"its `split` is {repr(row['split'])[:40]}, not text")))
        elif not isinstance(row, dict) or row["split"] == split:  # what is no row is said to be none
            kept.append((i, row))
    if not any(isinstance(row, dict) for _, row in kept):
        fail(f"{name}: no row whose `split` is {split!r}; choose another with --split")
    return kept


def rows_of(row, kind: str, columns: dict[str, str], train_on: str) -> list[dict]:
    """The checked rows of ours that a file's row holds. Raises ValueError."""
    if isinstance(row, Unreadable):
        raise ValueError(row)
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named columns, found {type(row).__name__}")
    taken = {*formats.ON_THE_WAY, SPLIT_BY} & set(row)
    if taken:
        raise ValueError(f"the name of the column {min(taken)!r} is needed here; rename it")
    found = []
    for held in formats.ours(rename_columns(row, kind, columns), kind):
        turns = formats.turns_of(held, train_on) if kind == "sft" else [held]
        opening = formats.opening_of(held)
        for each in turns:
            checked = check_row(each, kind)
            if formats.WHOLE in checked:
                checked[SPLIT_BY] = opening
            found.append({key: value for key, value in checked.items() if key not in formats.ON_THE_WAY})
    return found


def say_counts(name: str, kind: str, counts: Counter, train_on: str) -> None:
    """What was dropped or unfolded, in notes."""
    if counts["bad"]:
        note(f"{name}: dropped {counts['bad']} bad rows of {counts['bad'] + counts['rows']}")
    if counts["nothing"]:
        why = "a tie, no rated answers, two equal answers, or weights of 0"
        note(f"{name}: {counts['nothing']} rows dropped: {why}")
    if counts["system"]:
        note(f"{name}: in {counts['system']} rows a column holds the system message of the prompt")
    if counts["prefilled"]:
        note(
            f"{name}: {counts['prefilled']} prompts end with the beginning of the answer, which goes on there"
        )
    if counts["conversations"] and kind == "sft":
        turns = "every answer" if train_on == "all" else "the last answer"
        note(f"{name}: {counts['conversations']} conversations; {turns} is trained, {counts['turns']} in all")
    if counts["several"]:
        note(
            f"{name}: in {counts['several']} rows an answer is several messages; those of user and tools among "
            "them count as part of it"
        )


def has_other_speakers(row: dict, kind: str) -> bool:
    """Whether an answer of the row holds messages that are not the assistant's."""
    answers = [row[column] for column in KINDS[kind] if column != "prompt"]
    messages = [message for answer in answers if isinstance(answer, list) for message in answer]
    return any(message["role"] != "assistant" for message in messages)


def once_per_prompt(name: str, rows: list[dict]) -> list[dict]:
    """The last row of each prompt, in the place of its first: a file may hold many answers to one prompt. Rows
    that differ in a column that is not ours (a solution to compare with) are all kept."""
    of_prompt = {}
    for row in rows:
        others = json.dumps(columns_of_prompt(row), sort_keys=True, default=str)
        of_prompt[prompt_key(row["prompt"]), others] = row
    if len(of_prompt) < len(rows):
        note(f"{name}: {len(rows) - len(of_prompt)} rows dropped whose prompt another row has")
    return list(of_prompt.values())


def columns_of_prompt(row: dict) -> dict:
    """The columns of a row that say something about its prompt (a solution, tools) and are not ours: nothing of
    an answer that the file may hold beside it, no split, no number."""
    not_asked = {*OURS, *ALIASES.values(), *formats.CONVERSATIONS, "split", "row", SPLIT_BY}
    not_asked |= {column for pair in formats.SCORES for column in pair}
    return {key: value for key, value in row.items() if key not in not_asked}


def read_file(name: str, split: str) -> list:
    """The rows of a local file or folder, or of the hub data set `name` with `split`, as they are; Unreadable
    where one is none. Ends with one line where it cannot be read."""
    suffix = Path(name.removesuffix(".gz")).suffix
    if Path(name).is_dir() or suffix not in (".jsonl", ".json", ".parquet"):
        if Path(name).is_file():
            fail(f"{name}: cannot read {suffix or 'such'} files; use .jsonl, .json or .parquet (.gz too)")
        return read_hub(name, split)
    if not Path(name).is_file():
        fail(f"{name}: no such file")
    try:
        if suffix == ".parquet":
            return from_arrow(datasets.Dataset.from_parquet(name, keep_in_memory=True))
        return read_json(name, a_row_per_line=suffix == ".jsonl")
    except (OSError, EOFError, ValueError, zlib.error, datasets.exceptions.DatasetGenerationError) as error:
        fail(f"{name}: cannot be read ({str(error).splitlines()[0]})")


def read_hub(name: str, split: str) -> list[dict]:
    """The rows of a data set on the hub (`id` or `id:configuration`), of a folder in the hub's form, or of one
    that `save_to_disk` wrote. Ends with one line where there is none."""
    path, _, configuration = name.partition(":") if not Path(name).exists() else (name, "", "")
    saved = [Path(path, file) for file in ("dataset_dict.json", "dataset_info.json")]
    try:
        if any(file.is_file() for file in saved):
            found = datasets.load_from_disk(path)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise ValueError(f"it has the splits {', '.join(found)}")
                found = found[split]
        else:
            found = datasets.load_dataset(path, configuration or None, split=split)
        return from_arrow(found)
    except Exception as error:  # the library raises many types, some with a message of many lines
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        fail(f"{name}: neither a local file nor a hub data set with split {split!r} ({why})")


def from_arrow(found: datasets.Dataset) -> list[dict]:
    """Its rows. Arrow gives each message and tool the keys of all others, None where it has none: these are left
    out."""
    rows = found.to_list()
    for row in rows:
        for column, value in row.items():
            if column == "tools" or formats.is_messages(value):
                row[column] = as_in_json(value)
    return rows


def as_in_json(value):
    """The value without the keys, at any depth, whose value is None; what JSON does not have (a time) as text."""
    if isinstance(value, dict):
        return {key: as_in_json(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [as_in_json(each) for each in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def read_json(name: str, a_row_per_line: bool) -> list:
    """The values of a .jsonl or .json file, .gz or not; a list among them counts as its items; Unreadable where
    a line is no JSON."""
    open_text = gzip.open if name.endswith(".gz") else open
    rows = []
    # what is no UTF-8 becomes half characters, which are a fault of their row
    with open_text(name, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
        texts = file if a_row_per_line else [file.read()]
        for text in texts:
            if not text.strip():
                continue
            try:
                value = json.loads(text, object_pairs_hook=as_object)
            except json.JSONDecodeError as error:
                value = Unreadable(f"not JSON ({error.msg}); a .jsonl file has one object a line")
            except RepeatedKey as error:
                value = Unreadable(f"the key {error.args[0]!r} stands twice in one object")
            except (
                RecursionError,
                ValueError,
            ) as error:  # deep nesting; an integer of more than 4,300 digits
                value = Unreadable(f"no JSON that Python reads ({type(error).__name__})")
            if isinstance(value, list):
                rows += value
            else:
                rows.append(value)
    return rows


class RepeatedKey(Exception):
    """A key that an object of JSON has twice."""


def as_object(pairs: list[tuple]) -> dict:
    """An object of JSON. Raises RepeatedKey: readers of JSON do not agree which of the values counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return found


def check_row(row: dict, kind: str) -> dict:
    """The row with checked types. Raises ValueError naming the column and the remedy."""
    row = dict(row)
    for column in KINDS[kind]:
        value = row.get(column)
        if value is None:
            have = ", ".join(sorted(set(row) - {"split"}))
            raise ValueError(
                f"no {column!r} among the columns {have}; name yours with --columns {column} YOURS"
            )
        if column == "reward":
            if not formats.is_finite_number(value):
                raise ValueError(f"{column} is {repr(value)[:40]}, not a finite number")
        elif column == "label":
            if value not in (True, False):  # 1 and 0 are
                raise ValueError(f"{column} is {repr(value)[:40]}, not true or false")
            row[column] = bool(value)
        elif column == "prompt":
            row[column] = checked_prompt(value)
        else:
            row[column] = checked_answer(column, value)
    require_unicode("tools", row.get("tools"))
    return row


def checked_prompt(value) -> str | list[dict]:
    """A text or messages. Raises ValueError."""
    if isinstance(value, list) and formats.is_messages(value):
        value = formats.as_messages(value)
        texts = [message["content"] for message in value]
        if not "".join(texts).strip() and not any(message.get("tool_calls") for message in value):
            raise ValueError("prompt is empty")
    else:
        texts = [value]
        require_text("prompt", value)
    require_unicode("prompt", value)
    return value


def checked_answer(column: str, value) -> str | list[dict]:
    """A text, or messages where an answer is more than one plain message. Raises ValueError."""
    if not (isinstance(value, list) and formats.is_messages(value)):
        require_text(column, value)
        require_unicode(column, value)
        return value
    messages = formats.as_messages(value)
    if messages[0]["role"] != "assistant":
        raise ValueError(f"{column} begins with a message of the {messages[0]['role']}, not with an answer")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{column} ends with a message of the {messages[-1]['role']}, not with an answer")
    require_unicode(column, messages)
    for message in messages:
        says_more = any(message.get(key) for key in ("tool_calls", *templates.THOUGHTS))
        if message["role"] == "assistant" and not message["content"].strip() and not says_more:
            raise ValueError(f"{column} is empty")
    if len(messages) == 1 and set(messages[0]) == {"role", "content"}:
        return messages[0]["content"]
    return messages


def require_text(column: str, value) -> None:
    """Raises ValueError where a value is no text, or an empty one."""
    if not isinstance(value, str):
        raise ValueError(
            f"{column} is {type(value).__name__}, not text or chat messages with `role` and `content`"
        )
    if not value.strip():
        raise ValueError(f"{column} is empty")


def require_unicode(column: str, value) -> None:
    """Raises ValueError where, in a text or anywhere in messages, half of a pair of surrogates stands alone,
    which no tokenizer reads."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{column} holds what is no UTF-8 text (half a character: a lone surrogate)"
        ) from None


def rename_columns(row: dict, kind: str, columns: dict[str, str]) -> dict:
    """A copy of the row in which our columns have our names; `columns` decide, then our own name, its
    alias."""
    row = dict(row)
    for ours in set(columns) | set(KINDS[kind]):
        theirs = columns.get(ours)
        if theirs:
            parts = [row[column] for column in theirs.split("+") if row.get(column) not in (None, "")]
            texts = all(isinstance(part, str) for part in parts)
            row[ours] = "\n\n".join(parts) if len(parts) > 1 and texts else (parts or [None])[0]
            if len(parts) > 1 and not texts:
                raise ValueError(f"--columns {ours} {theirs} joins texts, and not all of them are")
        elif ours not in row and ALIASES.get(ours) in row:
            row[ours] = row[ALIASES[ours]]
    return row


# --- splits by prompt


def prompt_key(prompt: str | list[dict]) -> str:
    """The same of a text and of that text as the one message of a user."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0].get("role") == "user":
        prompt = prompt[0]["content"]
    return json.dumps(prompt, default=str)  # messages may have a time


def prompt_hash(prompt: str | list[dict], seed: int) -> float:
    """A number in [0, 1) that depends on the prompt and the seed alone."""
    digest = hashlib.sha256(f"{seed}:{prompt_key(prompt)}".encode()).hexdigest()
    return int(digest[:13], 16) / 16**13  # 52 bits: as many as a float holds exactly


def row_hash(row: dict, seed: int) -> float:
    """The hash that decides a row's part: its prompt's. Of a row from a conversation that of what stands before
    the first answer, so that all turns are in one part."""
    return prompt_hash(row.get(SPLIT_BY, row["prompt"]), seed)


def hold_out_prompts(rows: list[dict], count: int, split_seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, `count` held-out rows) of a file of prompts: the same whatever their order in it. More are
    held out where rows share the last prompt, which is not to be trained on."""
    order = sorted(rows, key=lambda row: prompt_hash(row["prompt"], split_seed + EVALUATION_SALT))
    while 0 < count < len(order) and prompt_key(order[count]["prompt"]) == prompt_key(
        order[count - 1]["prompt"]
    ):
        count += 1
    return order[count:], order[:count]


def hold_out(rows: list[dict], fraction: float, split_seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows), disjoint by prompt: about `fraction` of the prompts are held out."""
    training = []
    held_out = []
    for row in rows:
        if row_hash(row, split_seed + HOLD_OUT_SALT) < fraction:
            held_out.append(row)
        else:
            training.append(row)
    if 0 < len(held_out) < FEW:
        note(f"only {len(held_out)} rows are held out: their numbers say little; more with --eval-fraction")
    return training, held_out
