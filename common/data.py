"""Reading, checking and tokenizing data; ragged sequences to micro-batches.

A row is a dict. `prompt` is a string or a list of chat messages, `response` / `chosen` / `rejected` are strings. Everything
here is deterministic in its arguments, so that every rank holds the same rows and a resumed run needs only its step number.
"""

import gzip
import hashlib
import json
import math
import os
import random
from pathlib import Path

import torch

KINDS = {  # the columns a row must have, by kind of data set
    "prompts": ("prompt",),
    "sft": ("prompt", "response"),
    "preference": ("prompt", "chosen", "rejected"),
    "scored": ("prompt", "response", "reward"),
    "labelled": ("prompt", "response", "label"),
}
ALIASES = {"response": "completion", "reward": "score"}
PARTS = {"sft": (0.0, 0.3), "value": (0.3, 0.8), "rl": (0.8, 1.0), "all": (0.0, 1.0)}  # 2502.16944: 30 / 50 / 20 %


def fail(message: str):
    """Stop with one line, no traceback; on several ranks (which all find the same fault) only rank 0 prints it."""
    raise SystemExit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)


def note(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def read_rows(name, kind, *, split="train", columns=None, part="all", split_seed=0, skip_bad_rows=False) -> list[dict]:
    """Rows of `kind` from `reviews`, a local .jsonl / .json / .parquet file (.gz too) or a hub id.

    `split` is the hub's split, or the value to keep of a local file's `split` column where it has one. `columns` maps our
    names to the file's. `part` keeps the 30 / 50 / 20 % of the prompts that 2502.16944 gives to `sft`, `value` and `rl`:
    by a hash of the prompt and `split_seed`, so the parts are disjoint whatever the order or the other rows.
    Raises SystemExit with one line that names the file, the row and the mend.
    """
    unknown = set(columns or {}) - {name for names in KINDS.values() for name in names} - {"policy"}
    if unknown:
        fail(f"--columns: {sorted(unknown)[0]!r} is not a column of ours; use prompt, response, chosen, rejected, reward, label, policy")
    if name == "reviews":
        from common import reviews

        source = list(enumerate(reviews.rows(kind), 1))
    else:
        source = list(enumerate(_read_file(name) if Path(name).suffix or Path(name).exists() else _read_hub(name, split), 1))
        if any("split" in row for _, row in source[:1]):
            source = [(i, row) for i, row in source if row.get("split") == split]
            if not source:
                fail(f"{name}: no row whose `split` is {split!r}; choose another with --split")
    if source and "completions" in source[0][1] and "instruction" in source[0][1]:
        source = [(i, new) for i, row in source for new in _ultrafeedback(row, kind)]
    rows, bad = [], 0
    for i, row in source:
        problem = None
        try:
            row = _check_row(row, kind, columns or {})
        except ValueError as error:
            problem = str(error)
        if problem and not skip_bad_rows:
            fail(f"{name}, row {i}: {problem} (or drop such rows with --skip-bad-rows)")
        if problem:
            bad += 1
        else:
            rows.append({**row, "row": i})
    if bad:
        note(f"{name}: dropped {bad} bad rows of {len(source)}")
    low, high = PARTS[part]
    rows = [row for row in rows if low <= prompt_hash(row["prompt"], split_seed) < high]
    if not rows:
        fail(f"{name}: no usable row (part {part!r} of split {split!r})")
    return rows


def prompt_hash(prompt, seed: int) -> float:
    """A number in [0, 1) that depends on the prompt and the seed alone."""
    digest = hashlib.sha256(f"{seed}:{json.dumps(prompt)}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def hold_out(rows: list[dict], fraction: float, split_seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows), disjoint by prompt."""
    held = [row for row in rows if prompt_hash(row["prompt"], split_seed + 1_000_003) < fraction]
    return [row for row in rows if prompt_hash(row["prompt"], split_seed + 1_000_003) >= fraction], held


def _read_file(name: str) -> list[dict]:
    if not Path(name).is_file():
        fail(f"{name}: no such file")
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(name).to_pylist()
    if suffix not in (".jsonl", ".json"):
        fail(f"{name}: cannot read {suffix or 'this'} files; use .jsonl, .json or .parquet (.gz too)")
    try:
        with (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8") as file:
            if suffix == ".json":
                rows = json.load(file)
                rows = rows if isinstance(rows, list) else [rows]
            else:
                rows = []
                for i, line in enumerate(file, 1):
                    if line.strip():
                        rows.append(_parse(name, i, line))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, EOFError) as error:
        fail(f"{name}: not readable as {suffix}: {error}")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            fail(f"{name}, row {i}: expected an object with named columns, found {type(row).__name__}")
    return rows


def _parse(name: str, i: int, line: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        fail(f"{name}, row {i}: not JSON ({error.msg}); each line of a .jsonl file is one object")


def _read_hub(name: str, split: str) -> list[dict]:
    import datasets

    try:
        return datasets.load_dataset(name, split=split).to_list()
    except Exception as error:  # the library raises many types, some without a message of one line
        fail(f"{name}: neither a local file nor a hub data set with split {split!r} ({type(error).__name__}: {str(error).splitlines()[0]})")


def _ultrafeedback(row: dict, kind: str) -> list[dict]:
    """openbmb/UltraFeedback: one row holds `completions`, each with `response`, `overall_score`, `model`."""
    scored = [
        {"prompt": row["instruction"], "response": c["response"], "reward": c["overall_score"], "policy": c.get("model")}
        for c in row["completions"]
    ]
    if kind == "scored" or not scored:
        return scored
    scored.sort(key=lambda r: r["reward"])
    if kind == "preference":  # the best against the worst; ties teach nothing
        low, high = scored[0], scored[-1]
        pair = {"chosen": high["response"], "rejected": low["response"]}
        pair |= {"chosen_policy": high["policy"], "rejected_policy": low["policy"]}
        return [{"prompt": row["instruction"], **pair}] if low["reward"] < high["reward"] else []
    return [scored[-1]]


def _check_row(row: dict, kind: str, columns: dict[str, str]) -> dict:
    """The row with our column names and checked types. Raises ValueError naming the column and the mend."""
    row = dict(row)
    for ours in set(columns) | set(KINDS[kind]):
        theirs = columns.get(ours) or (ours if ours in row else ALIASES.get(ours, ours))
        if theirs in row:
            row[ours] = row[theirs]
    full = row.get("chosen")
    if kind == "preference" and "prompt" not in row and isinstance(full, list) and len(full) > 1:
        row["prompt"] = full[:-1]  # whole conversations: the prompt is all but the last message
    for column in KINDS[kind]:
        if column not in row or row[column] is None:
            have = ", ".join(sorted(key for key in row if key not in ("row", "split")))
            raise ValueError(f"no column {column!r} among: {have}; name yours with --columns {column} YOURS")
        value = row[column]
        if column == "prompt":
            row[column] = _check_prompt(value)
        elif column == "reward":
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"reward is {value!r}, not a number")
            if not math.isfinite(value):
                raise ValueError(f"reward is {value}; only finite numbers can be learned from")
        elif column == "label":
            if not isinstance(value, bool):
                raise ValueError(f"label is {value!r}, not true or false")
        else:
            if isinstance(value, list) and value and isinstance(value[-1], dict):
                value = value[-1].get("content")  # chat messages: the answer is the last one
            if not isinstance(value, str):
                raise ValueError(f"{column} is {type(value).__name__}, not text or chat messages")
            if not value.strip():
                raise ValueError(f"{column} is empty")
            row[column] = value
    return row


def _check_prompt(value):
    if isinstance(value, list):
        if not value or any(not isinstance(m, dict) or not {"role", "content"} <= set(m) for m in value):
            raise ValueError("prompt is a list, but not of chat messages with `role` and `content`")
        return [{"role": m["role"], "content": m["content"]} for m in value]
    if not isinstance(value, str):
        raise ValueError(f"prompt is {type(value).__name__}, not text or chat messages")
    if not value.strip():
        raise ValueError("prompt is empty")
    return value


# --- tokens ----------------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer, prompt) -> list[int]:
    """Prompt tokens, ready for an answer: through the chat template where there is one, else plain text with one BOS."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt) + "\n"
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def stop_token(tokenizer) -> int:
    """The token that ends an answer: what the chat template writes after one (Gemma's is not its eos), else eos."""
    if tokenizer.chat_template:
        mark = "zq"
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(mark)[2]
        ids = tokenizer(tail.strip(), add_special_tokens=False)["input_ids"]
        if ids and ids[0] in tokenizer.all_special_ids:
            return ids[0]
    return tokenizer.eos_token_id


def encode_response(tokenizer, text: str, max_length: int) -> list[int]:
    """Response tokens with their end-of-answer token; cut off (and then without it) at `max_length`."""
    return (tokenizer(text, add_special_tokens=False)["input_ids"] + [stop_token(tokenizer)])[:max_length]


def tokenize(rows, tokenizer, fields, max_prompt_length, max_response_length, name) -> list[dict]:
    """Adds `prompt_ids` and `<field>_ids` to the rows. Over-long prompts are dropped and counted, over-long answers cut."""
    kept, cut = [], 0
    for row in rows:
        ids = {"prompt_ids": encode_prompt(tokenizer, row["prompt"])}
        if len(ids["prompt_ids"]) > max_prompt_length:
            continue
        for field in fields:
            ids[f"{field}_ids"] = encode_response(tokenizer, row[field], max_response_length)
            cut += len(ids[f"{field}_ids"]) == max_response_length and ids[f"{field}_ids"][-1] != stop_token(tokenizer)
        kept.append({**row, **ids})
    if len(kept) < len(rows):
        note(f"{name}: dropped {len(rows) - len(kept)} of {len(rows)} rows: prompt longer than --max-prompt-length {max_prompt_length}")
    if cut:
        note(f"{name}: cut {cut} responses at --max-response-length {max_response_length}")
    if not kept:
        fail(f"{name}: no usable row: every prompt is longer than --max-prompt-length {max_prompt_length}")
    return kept


def add_context(rows: list[dict], k: int, pool: list[dict], tokenizer, max_pair_length: int, seed: int) -> list[dict]:
    """Policy conditioning (2502.16944 v1, section 3.2): prefixes each prompt with `k` question-answer pairs that the same
    policy wrote for *other* prompts, drawn from `pool` (rows with `prompt_ids`, `response_ids`, `policy`). A pair is
    cut at `max_pair_length` tokens; where the policy has fewer other prompts than `k`, the prefix is shorter.
    """
    if not k:
        return rows
    by_policy = {}
    for pair in pool:
        by_policy.setdefault(pair.get("policy"), []).append(pair)
    out = []
    for i, row in enumerate(rows):
        rng = random.Random(f"{seed}:{i}")
        others = by_policy.get(row.get("policy"), [])
        chosen = []
        for pair in rng.sample(others, min(len(others), k + 8)):
            if pair["prompt_ids"] != row["prompt_ids"] and len(chosen) < k:
                chosen.append(pair)
        parts = [(pair["prompt_ids"] + pair["response_ids"])[:max_pair_length] for pair in chosen] + [row["prompt_ids"]]
        bos = tokenizer.bos_token_id
        ids = parts[0] + [t for p in parts[1:] for t in (p[1:] if p[0] == bos != tokenizer.eos_token_id else p)]  # one BOS
        out.append({**row, "prompt_ids": ids})
    return out


# --- batches ---------------------------------------------------------------------------------------------------------


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The rows of batch `step` (0-based): epochs of fresh permutations, no state, the last short batch left out."""
    per_epoch = max(1, n // batch_size)
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return [order[i % n] for i in range(position * batch_size, (position + 1) * batch_size)]


def collate(sequences: list[tuple[list[int], list[int]]], pad_id: int, device) -> dict[str, torch.Tensor]:
    """(prompt tokens, response tokens) pairs to right-padded tensors.

    Returns input_ids [B, L], prompt_lengths [B], response_mask [B, T]: all masks come from positions, never from
    `token != pad`. An empty list gives one masked dummy sequence: a rank with nothing to do still joins the collectives.
    """
    sequences = sequences or [([pad_id], [])]
    length = max(len(p) + len(r) for p, r in sequences)
    longest = max(1, max(len(r) for _, r in sequences))
    input_ids = torch.full((len(sequences), max(length, 2)), pad_id)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for i, (prompt, response) in enumerate(sequences):
        input_ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[i, : len(response)] = True
    prompts = torch.tensor([len(p) for p, _ in sequences])
    return {"input_ids": input_ids.to(device), "prompt_lengths": prompts.to(device), "response_mask": mask.to(device)}


def micro_batches(indices: list[int], lengths: list[int], size: int, rank: int, world: int) -> list[list[int]]:
    """This rank's micro-batches of a global batch: sorted by length (little padding, balanced ranks), dealt out in turn.

    Every rank gets the same number of them (collectives must match), the last ones empty if need be.
    """
    order = sorted(indices, key=lambda i: (-lengths[i], i))
    mine = order[rank::world]
    count = math.ceil(math.ceil(len(order) / world) / size)
    return [mine[i * size : (i + 1) * size] for i in range(count)]
