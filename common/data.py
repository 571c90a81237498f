"""Rows from a hub id or a file: formats, checks, splits by prompt.

Everything here is deterministic in its arguments: every rank holds the same rows, a resumed run needs only
its step number."""

import gzip
import hashlib
import json
import math
from pathlib import Path

import datasets

from assets import reviews
from common.cli import fail, note

KINDS = {  # the columns a row must have, by kind of data set
    "prompts": ("prompt",),
    "sft": ("prompt", "response"),
    "preference": ("prompt", "chosen", "rejected"),
    "scored": ("prompt", "response", "reward"),
    "labelled": ("prompt", "response", "label"),
    "responses": ("prompt", "response"),  # all of them, where `sft` takes UltraFeedback's best
}
OURS = ("prompt", "response", "chosen", "rejected", "reward", "label", "policy")  # what --columns may name
ALIASES = {"response": "completion", "reward": "score"}  # names that a file may use without --columns

# Added to --split-seed, so that the hash that orders prompts for one purpose says nothing about another.
EVALUATION_SALT = 1
HOLD_OUT_SALT = 1_000_003

PARTS = {  # shares of the prompts, by their hash in [0, 1): 2502.16944's 30 / 50 / 20 %
    "sft": (0.0, 0.3),
    "value": (0.3, 0.8),
    "rl": (0.8, 1.0),
    "all": (0.0, 1.0),
}


# --- reading and checking


def read_rows(
    name: str,
    kind: str,
    *,
    split: str = "train",
    columns: dict[str, str] | None = None,
    part: str = "all",
    split_seed: int = 0,
    skip_bad_rows: bool = False,
) -> list[dict]:
    """Rows of `kind` (a key of KINDS) from `reviews`, a .jsonl / .json / .parquet file (.gz too) or a hub id.

    `split`: the hub's, or the value to keep of a file's `split` column. `columns` maps our names to the
    file's. `part` keeps 2502.16944's share of the prompts, by a hash of each: disjoint whatever the order.
    Each row gets `row`, its number in the file from 1. Ends with one line that names the file, the row and
    the remedy; `skip_bad_rows` drops and counts such rows.
    """
    columns = columns or {}
    for unknown in set(columns) - set(OURS):
        fail(f"--columns: {unknown!r} is not a column of ours; use {', '.join(OURS)}")
    found = reviews.rows(kind) if name == "reviews" else read_file(name, split)
    numbered = list(enumerate(found, 1))
    if numbered and "split" in numbered[0][1]:
        numbered = [(i, row) for i, row in numbered if row.get("split") == split]
        if not numbered:
            fail(f"{name}: no row whose `split` is {split!r}; choose another with --split")
    if numbered and is_ultrafeedback(numbered[0][1]):
        numbered = unfold_ultrafeedback(name, kind, numbered)

    rows = []
    bad = 0
    for i, row in numbered:
        try:
            checked = check_row(row, kind, columns)
        except ValueError as error:
            if not skip_bad_rows:
                fail(f"{name}, row {i}: {error} (or drop such rows with --skip-bad-rows)")
            bad += 1
        else:
            rows.append({**checked, "row": i})
    if bad:
        note(f"{name}: dropped {bad} bad rows of {len(numbered)}")
    if kind == "prompts":
        rows = once_per_prompt(rows)
    low, high = PARTS[part]
    rows = [row for row in rows if low <= prompt_hash(row["prompt"], split_seed) < high]
    if not rows:
        fail(f"{name}: no usable row (part {part!r} of split {split!r})")
    return rows


def once_per_prompt(rows: list[dict]) -> list[dict]:
    """The last row of each prompt, in the place of its first: a file may hold many answers to one prompt."""
    of_prompt = {}
    for row in rows:
        of_prompt[json.dumps(row["prompt"])] = row
    return list(of_prompt.values())


def read_file(name: str, split: str) -> list[dict]:
    """The rows of a local file, or of the hub data set `name` with `split`, as they are.

    Ends with one line where it cannot be read, or a row is not an object with named columns.
    """
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in (".jsonl", ".json", ".parquet"):
        if suffix and Path(name).exists():
            fail(f"{name}: cannot read {suffix} files; use .jsonl, .json or .parquet (.gz too)")
        return read_hub(name, split)
    if not Path(name).is_file():
        fail(f"{name}: no such file")
    try:
        if suffix == ".parquet":
            return datasets.Dataset.from_parquet(name, keep_in_memory=True).to_list()
        rows = read_json(name, a_row_per_line=suffix == ".jsonl")
    except (OSError, EOFError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        fail(f"{name}: cannot be read ({str(error).splitlines()[0]})")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            fail(f"{name}, row {i}: expected an object with named columns, found {type(row).__name__}")
    return rows


def read_hub(name: str, split: str) -> list[dict]:
    """The rows of a data set on the hub. Ends with one line where there is none."""
    try:
        return datasets.load_dataset(name, split=split).to_list()
    except Exception as error:  # the library raises many types, some with a message of many lines
        lines = str(error).splitlines() or [""]
        why = f"{type(error).__name__}: {lines[0]}"
        fail(f"{name}: neither a local file nor a hub data set with split {split!r} ({why})")


def read_json(name: str, a_row_per_line: bool) -> list:
    """The values of a .jsonl or .json file, .gz or not; a list among them counts as its items."""
    open_text = gzip.open if name.endswith(".gz") else open
    rows = []
    with open_text(name, "rt", encoding="utf-8") as file:
        texts = file if a_row_per_line else [file.read()]
        for i, text in enumerate(texts, 1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                fail(f"{name}, row {i}: not JSON ({error.msg}); a .jsonl file has one object a line")
            if isinstance(value, list):
                rows += value
            else:
                rows.append(value)
    return rows


def check_row(row: dict, kind: str, columns: dict[str, str]) -> dict:
    """The row with our column names and checked types. Raises ValueError naming the column and the remedy."""
    row = rename_columns(row, kind, columns)
    for column in KINDS[kind]:
        value = row.get(column)
        if value is None:
            have = ", ".join(sorted(set(row) - {"split"}))
            raise ValueError(
                f"no {column!r} among the columns {have}; name yours with --columns {column} YOURS"
            )
        if column == "reward":
            if not is_finite_number(value):
                raise ValueError(f"{column} is {value!r}, not a finite number")
        elif column == "label":
            if not isinstance(value, bool):
                raise ValueError(f"{column} is {value!r}, not true or false")
        elif column == "prompt" and is_chat(value):
            row[column] = [{"role": m["role"], "content": m["content"]} for m in value]
        else:
            text = value[-1]["content"] if is_chat(value) else value  # of messages, the last is the answer
            if not isinstance(text, str):
                kind_of_text = type(text).__name__
                raise ValueError(
                    f"{column} is {kind_of_text}, not text or chat messages with `role` and `content`"
                )
            if not text.strip():
                raise ValueError(f"{column} is empty")
            row[column] = text
    return row


def rename_columns(row: dict, kind: str, columns: dict[str, str]) -> dict:
    """A copy of the row in which our columns have our names; `columns` decide, then our own name, its
    alias."""
    row = dict(row)
    for ours in set(columns) | set(KINDS[kind]):
        theirs = columns.get(ours)
        if not theirs:
            theirs = ours if ours in row else ALIASES.get(ours)
        if theirs in row:
            row[ours] = row[theirs]
    if kind == "preference" and "prompt" not in row:
        conversation = row.get("chosen")
        if isinstance(conversation, list) and len(conversation) > 1:
            row["prompt"] = conversation[:-1]  # whole conversations: the prompt is all but the last message
    if "prompt" not in row and isinstance(row.get("turns"), list) and row["turns"]:
        row["prompt"] = row["turns"][0]  # MT-bench's questions
    return row


def is_finite_number(value) -> bool:
    """True and False are no numbers here, though Python has them as such."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_chat(value) -> bool:
    """A list of messages with `role` and `content`, at least one."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in value)


# --- UltraFeedback


def is_ultrafeedback(row: dict) -> bool:
    """Whether a row has the nesting of openbmb/UltraFeedback, the data of both papers: an `instruction` and
    the `completions` of several policies to it. No other data set that we know has both columns."""
    return "completions" in row and "instruction" in row


def unfold_ultrafeedback(name: str, kind: str, numbered: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
    """Its rows as rows of ours, each with the number of the row that it comes from.

    Prompts that give none are counted in a note.
    """
    unfolded = []
    dropped = 0
    for i, row in numbered:
        rows = ultrafeedback_rows(row, kind)
        unfolded += [(i, ours) for ours in rows]
        if not rows:
            dropped += 1
    if dropped:
        note(f"{name}: {dropped} prompts dropped: no rated completions, or no scores that differ")
    return unfolded


def ultrafeedback_rows(row: dict, kind: str) -> list[dict]:
    """One row of openbmb/UltraFeedback as rows of ours, by `kind`.

    `scored` and `responses`: every completion. `preference`: the best rated against the worst, none where
    they tie, as a tie teaches nothing. Else the best rated alone.
    """
    prompt = row["instruction"]
    scored = []
    for completion in row["completions"]:
        scored.append(
            {
                "prompt": prompt,
                "response": completion.get("response"),
                "reward": completion.get("overall_score"),
                "policy": completion.get("model"),
            }
        )
    if kind in ("scored", "responses"):
        return scored
    rated = [ours for ours in scored if isinstance(ours["reward"], int | float)]
    rated.sort(key=lambda ours: ours["reward"])
    if kind != "preference" or not rated:
        return rated[-1:]
    best = rated[-1]
    worst = rated[0]
    if worst["reward"] >= best["reward"]:
        return []
    pair = {
        "prompt": prompt,
        "chosen": best["response"],
        "rejected": worst["response"],
        "chosen_policy": best["policy"],
        "rejected_policy": worst["policy"],
    }
    return [pair]


# --- splits by prompt


def prompt_hash(prompt: str | list[dict], seed: int) -> float:
    """A number in [0, 1) that depends on the prompt and the seed alone."""
    digest = hashlib.sha256(f"{seed}:{json.dumps(prompt)}".encode()).hexdigest()
    return int(digest[:13], 16) / 16**13  # 52 bits: as many as a float holds exactly


def hold_out_prompts(rows: list[dict], count: int, split_seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, `count` held-out rows) of a file of prompts: the same whatever their order in it."""
    order = sorted(rows, key=lambda row: prompt_hash(row["prompt"], split_seed + EVALUATION_SALT))
    return order[count:], order[:count]


def hold_out(rows: list[dict], fraction: float, split_seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows), disjoint by prompt: about `fraction` of the prompts are held out."""
    training = []
    held_out = []
    for row in rows:
        if prompt_hash(row["prompt"], split_seed + HOLD_OUT_SALT) < fraction:
            held_out.append(row)
        else:
            training.append(row)
    return training, held_out
