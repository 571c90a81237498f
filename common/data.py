"""Reading, checking and tokenizing data; ragged sequences to micro-batches.
Everything here is deterministic in its arguments: every rank holds the same rows, a resumed run needs only its step number."""

import gzip
import hashlib
import json
import math
import os
import time
from pathlib import Path

import datasets
import jinja2
import torch

from assets import reviews
from optional import ultrafeedback

KINDS = {  # the columns a row must have, by kind of data set
    "prompts": ("prompt",), "sft": ("prompt", "response"), "preference": ("prompt", "chosen", "rejected"),
    "scored": ("prompt", "response", "reward"), "labelled": ("prompt", "response", "label"),
    "responses": ("prompt", "response"),  # all of them, where `sft` takes UltraFeedback's best
}
OURS = ("prompt", "response", "chosen", "rejected", "reward", "label", "policy")
ALIASES = {"response": "completion", "reward": "score"}
PARTS = {"sft": (0.0, 0.3), "value": (0.3, 0.8), "rl": (0.8, 1.0), "all": (0.0, 1.0)}  # 2502.16944: 30 / 50 / 20 %

def fail(message: str):
    """Stop with one line, no traceback. Of several ranks rank 0 speaks first; torchrun then ends the others."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # no tidy end: others may wait in a collective
        time.sleep(10 * (os.environ["RANK"] != "0"))
        os.write(2, f"error: {message}\n".encode())
        os._exit(1)
    raise SystemExit(f"error: {message}")

def note(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)

def read_rows(name, kind, *, split="train", columns=None, part="all", split_seed=0, skip_bad_rows=False) -> list[dict]:
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
        found = [(i, ultrafeedback.rows(row, kind)) for i, row in source]
        source = [(i, row) for i, rows in found for row in rows]
        if not all(rows for _, rows in found):
            note(f"{name}: {sum(not rows for _, rows in found)} prompts dropped: no rated completions, or no scores that differ")
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

def hold_out(rows: list[dict], fraction: float, split_seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows), disjoint by prompt."""
    held = [prompt_hash(row["prompt"], split_seed + 1_000_003) < fraction for row in rows]
    return [row for row, h in zip(rows, held, strict=True) if not h], [row for row, h in zip(rows, held, strict=True) if h]

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
    if kind == "preference" and "prompt" not in row and isinstance(row.get("chosen"), list) and len(row["chosen"]) > 1:
        row["prompt"] = row["chosen"][:-1]  # whole conversations: the prompt is all but the last message
    if "prompt" not in row and isinstance(row.get("turns"), list) and row["turns"]:
        row["prompt"] = row["turns"][0]  # MT-bench's questions
    for column in KINDS[kind]:
        value = row.get(column)
        if value is None:
            have = ", ".join(sorted(set(row) - {"split"}))
            raise ValueError(f"no {column!r} among the columns {have}; name yours with --columns {column} YOURS")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if column in ("label", "reward"):
            if not (number if column == "reward" else isinstance(value, bool)):
                raise ValueError(f"{column} is {value!r}, not " + ("a finite number" if column == "reward" else "true or false"))
            continue
        chat = isinstance(value, list) and value and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
        if chat and column == "prompt":
            row[column] = [{"role": m["role"], "content": m["content"]} for m in value]
            continue
        row[column] = value = value[-1]["content"] if chat else value  # chat messages: the answer is the last one
        if not isinstance(value, str):
            raise ValueError(f"{column} is {type(value).__name__}, not text or chat messages with `role` and `content`")
        if not value.strip():
            raise ValueError(f"{column} is empty")
    return row

def encode_prompt(tokenizer, prompt) -> list[int]:
    """Prompt tokens, ready for an answer: through the chat template where there is one, else plain text with one BOS. An encoder
    reads its input with the eos it was trained with, a decoder goes on from the text."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = tokenizer(prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt) + "\n")["input_ids"]
    ended = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not getattr(tokenizer, "of_encoder_decoder", False)
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
    return kept or fail(f"{name}: no usable row: every prompt is longer than --max-prompt-length {max_prompt_length}")

def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The rows of batch `step` (0-based): epochs of fresh permutations, no state, the last short batch left out."""
    epoch, position = divmod(step, max(1, n // batch_size))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return [order[i % n] for i in range(position * batch_size, (position + 1) * batch_size)]

def collate(sequences: list[tuple[list[int], list[int]]], pad_id: int, device) -> dict[str, torch.Tensor]:
    """(prompt tokens, response tokens) pairs to right-padded tensors.
    Returns input_ids [B, L], prompt_lengths [B], response_mask [B, T]: all masks come from positions, never from
    `token != pad`. An empty list gives one masked dummy sequence: a rank with nothing to do still joins the collectives."""
    sequences = sequences or [([pad_id], [])]
    lengths = torch.tensor([[len(p), len(r)] for p, r in sequences])
    input_ids = torch.full((len(sequences), max(2, int(lengths.sum(1).max()))), pad_id)
    for i, (prompt, response) in enumerate(sequences):
        input_ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
    mask = torch.arange(max(1, int(lengths[:, 1].max()))) < lengths[:, 1:]
    return {"input_ids": input_ids.to(device), "prompt_lengths": lengths[:, 0].to(device), "response_mask": mask.to(device)}

def micro_batches(indices, lengths: list[int], size: int, rank: int, world: int) -> list[list[int]]:
    """This rank's micro-batches of a global batch: sorted by length (little padding, balanced ranks), dealt out in turn.
    Every rank gets the same number of them (collectives must match), the last ones empty if need be."""
    order = sorted(indices, key=lambda i: (-lengths[i], i))
    count = math.ceil(math.ceil(len(order) / world) / size)
    return [order[rank::world][i * size : (i + 1) * size] for i in range(count)]
