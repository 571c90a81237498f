"""Rows from a hub id or a file: formats, checks, splits by prompt.

Everything here is deterministic in its arguments: every rank holds the same rows, a resumed run needs only its step number."""

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


OURS = ("prompt", "response", "chosen", "rejected", "reward", "label", "policy")


ALIASES = {"response": "completion", "reward": "score"}


# Added to --split-seed, so that the hash that orders prompts for one purpose says nothing about another.
EVALUATION_SALT = 1
HOLD_OUT_SALT = 1_000_003
PARTS = {
    "sft": (0.0, 0.3),
    "value": (0.3, 0.8),
    "rl": (0.8, 1.0),
    "all": (0.0, 1.0),
}  # 2502.16944: 30 / 50 / 20 %


def read_rows(
    name, kind, *, split="train", columns=None, part="all", split_seed=0, skip_bad_rows=False
) -> list[dict]:
    """Rows of `kind` from `reviews`, a local .jsonl / .json / .parquet file (.gz too) or a hub id. `split`: the hub's, or the
    value to keep of a file's `split` column. `columns` maps our names to the file's. `part` keeps 2502.16944's share of the
    prompts, by a hash of each: disjoint whatever the order. Ends with one line that names the file, the row and the mend."""
    columns = columns or {}
    for unknown in set(columns) - set(OURS):
        fail(f"--columns: {unknown!r} is not a column of ours; use {', '.join(OURS)}")
    source = list(enumerate(reviews.rows(kind) if name == "reviews" else _read(name, split), 1))
    if source and "split" in source[0][1]:
        source = [(i, row) for i, row in source if row.get("split") == split]
        if not source:
            fail(f"{name}: no row whose `split` is {split!r}; choose another with --split")
    if source and {"completions", "instruction"} <= set(source[0][1]):
        found = [(i, ultrafeedback_rows(row, kind)) for i, row in source]
        source = [(i, row) for i, rows in found for row in rows]
        if not all(rows for _, rows in found):
            note(
                f"{name}: {sum(not rows for _, rows in found)} prompts dropped: no rated completions, or no scores that differ"
            )
    rows, bad = [], 0
    for i, row in source:
        try:
            rows.append({**_check_row(row, kind, columns), "row": i})
        except ValueError as error:
            if not skip_bad_rows:
                fail(f"{name}, row {i}: {error} (or drop such rows with --skip-bad-rows)")
            bad += 1
    if bad:
        note(f"{name}: dropped {bad} bad rows of {len(source)}")
    if kind == "prompts":  # each once, also where the file holds many answers to it
        rows = list({json.dumps(row["prompt"]): row for row in rows}.values())
    low, high = PARTS[part]
    rows = [row for row in rows if low <= prompt_hash(row["prompt"], split_seed) < high]
    return rows or fail(f"{name}: no usable row (part {part!r} of split {split!r})")


def prompt_hash(prompt, seed: int) -> float:
    """A number in [0, 1) that depends on the prompt and the seed alone."""
    return int(hashlib.sha256(f"{seed}:{json.dumps(prompt)}".encode()).hexdigest()[:13], 16) / 16**13


def hold_out_prompts(rows: list[dict], count: int, split_seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, `count` held-out rows) of a file of prompts: the same prompts whatever their order in it."""
    order = sorted(rows, key=lambda row: prompt_hash(row["prompt"], split_seed + EVALUATION_SALT))
    return order[count:], order[:count]


def hold_out(rows: list[dict], fraction: float, split_seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows), disjoint by prompt."""
    held = [prompt_hash(row["prompt"], split_seed + HOLD_OUT_SALT) < fraction for row in rows]
    return [row for row, h in zip(rows, held, strict=True) if not h], [
        row for row, h in zip(rows, held, strict=True) if h
    ]


def _read(name: str, split: str) -> list[dict]:
    suffix, rows = Path(name.removesuffix(".gz")).suffix, []
    if suffix not in (".jsonl", ".json", ".parquet"):
        if suffix and Path(name).exists():
            fail(f"{name}: cannot read {suffix} files; use .jsonl, .json or .parquet (.gz too)")
        try:
            return datasets.load_dataset(name, split=split).to_list()
        except Exception as error:  # the library raises many types, some with a message of many lines
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            fail(f"{name}: neither a local file nor a hub data set with split {split!r} ({why})")
    if not Path(name).is_file():
        fail(f"{name}: no such file")
    try:
        if suffix == ".parquet":
            return datasets.Dataset.from_parquet(name, keep_in_memory=True).to_list()
        with (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8") as file:
            for i, text in enumerate(file if suffix == ".jsonl" else [file.read()], 1):  # noqa: B007 (the except uses it)
                value = json.loads(text) if text.strip() else []
                rows += value if isinstance(value, list) else [value]
    except json.JSONDecodeError as error:
        fail(f"{name}, row {i}: not JSON ({error.msg}); a .jsonl file has one object a line")
    except (OSError, EOFError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        fail(f"{name}: cannot be read ({str(error).splitlines()[0]})")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            fail(f"{name}, row {i}: expected an object with named columns, found {type(row).__name__}")
    return rows


def _check_row(row: dict, kind: str, columns: dict[str, str]) -> dict:
    """The row with our column names and checked types. Raises ValueError naming the column and the mend."""
    row = dict(row)
    for ours in set(columns) | set(KINDS[kind]):
        theirs = columns.get(ours) or (ours if ours in row else ALIASES.get(ours))
        if theirs in row:
            row[ours] = row[theirs]
    if (
        kind == "preference"
        and "prompt" not in row
        and isinstance(row.get("chosen"), list)
        and len(row["chosen"]) > 1
    ):
        row["prompt"] = row["chosen"][:-1]  # whole conversations: the prompt is all but the last message
    if "prompt" not in row and isinstance(row.get("turns"), list) and row["turns"]:
        row["prompt"] = row["turns"][0]  # MT-bench's questions
    for column in KINDS[kind]:
        value = row.get(column)
        if value is None:
            have = ", ".join(sorted(set(row) - {"split"}))
            raise ValueError(
                f"no {column!r} among the columns {have}; name yours with --columns {column} YOURS"
            )
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if column in ("label", "reward"):
            if not (number if column == "reward" else isinstance(value, bool)):
                raise ValueError(
                    f"{column} is {value!r}, not "
                    + ("a finite number" if column == "reward" else "true or false")
                )
            continue
        chat = (
            isinstance(value, list)
            and value
            and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
        )
        if chat and column == "prompt":
            row[column] = [{"role": m["role"], "content": m["content"]} for m in value]
            continue
        row[column] = value = (
            value[-1]["content"] if chat else value
        )  # chat messages: the answer is the last one
        if not isinstance(value, str):
            raise ValueError(
                f"{column} is {type(value).__name__}, not text or chat messages with `role` and `content`"
            )
        if not value.strip():
            raise ValueError(f"{column} is empty")
    return row


def ultrafeedback_rows(row: dict, kind: str) -> list[dict]:
    """openbmb/UltraFeedback's own nesting, the data of both papers, as rows of ours: a row holds `completions`, each with
    `response`, `overall_score`, `model`."""
    names, prompt = (
        {"response": "response", "reward": "overall_score", "policy": "model"},
        {"prompt": row["instruction"]},
    )
    scored = [prompt | {ours: c.get(name) for ours, name in names.items()} for c in row["completions"]]
    if kind in ("scored", "responses"):
        return scored
    rated = sorted((r for r in scored if isinstance(r["reward"], (int, float))), key=lambda r: r["reward"])
    if kind != "preference" or not rated:
        return rated[-1:]
    sides = {"chosen": rated[-1], "rejected": rated[0]}  # the best against the worst; ties teach nothing
    pair = (
        prompt
        | {s: r["response"] for s, r in sides.items()}
        | {f"{s}_policy": r["policy"] for s, r in sides.items()}
    )
    return [pair] if rated[0]["reward"] < rated[-1]["reward"] else []
