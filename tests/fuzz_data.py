"""Mutated data files: each is read right, or refused in one `error:` line that names the row. Nothing else.

    python tests/fuzz_data.py               # 300 files; tests/test_input.py reads the first 60
    python tests/fuzz_data.py --only 17     # one of them, and what became of it

A case is a number: it seeds the choice of a data set's form, of a mutation and of the kind of file. Three kinds
of mutation: `kept` writes the same rows in another way, and they must be read as they were; `row` spoils one row,
whose neighbours must be read as they were, or the error must name it; `bytes` spoils the file.
"""

import argparse
import contextlib
import copy
import gzip
import io
import json
import math
import random
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import chat_templates
from formats import FORMATS, PAIR, A, B, Format, Q

from common.data import KINDS, read_rows
from common.tokenization import tokenize
from evaluation import benchmarks, judge, length_controlled

COUNT = 300
ROWS = 4  # of a file
OURS = [
    Format("ours", "prompts", {"prompt": Q}, [{"prompt": Q}]),
    Format("ours", "sft", {"prompt": Q, "response": A}, [{"prompt": Q, "response": A}]),
    Format(
        "ours", "scored", *[{"prompt": Q, "response": A, "reward": 0.5}] * 1, [{"prompt": Q, "reward": 0.5}]
    ),
    Format("ours", "labelled", {"prompt": Q, "response": A, "label": False}, [{"prompt": Q, "label": False}]),
    Format("ours", "preference", PAIR, [PAIR]),
]
READ = [each for each in FORMATS if isinstance(each.found, list) and each.found]

# A chat template that writes all that messages hold; with it bytes are tokens, so that no text is unknown.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Of each reader of evaluate.py a row that it reads.
TURNS = {"question_id": 81, "category": "writing", "turns": ["one", "two"]}
ANSWER = {"question_id": 81, "model_id": "m", "choices": [{"index": 0, "turns": ["one", "two"]}]}
SINGLE = {
    "question_id": 81,
    "model": "m",
    "judge": ["j", "single-v1"],
    "score": 7,
    "turn": 1,
    "category": "math",
}
DOUBLE = {"question_id": 81, "model_1": "m", "model_2": "n", "judge": "j", "turn": 1}
DOUBLE |= {"g1_winner": "tie", "g2_winner": "model_1"}
GAMES = {"uid": "1", "category": "hard", "judge": "j", "model": "m", "baseline": "n"}
GAMES |= {"games": [{"score": "A>>B"}, {"score": "A=B"}]}
ARENA = {"uid": "1", "model": "m", "messages": [{"role": "user", "content": "q"}]}
ARENA["messages"] += [{"role": "assistant", "content": {"answer": "a"}}]
JUDGED = {
    "prompt": "q",
    "responses": ["a", "b"],
    "judged": ["A"],
    "points": 0.75,
    "files": ["a", "b"],
    "judge": "j",
}
ALPACA = {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.75, "annotator": "j"}


def numbers(mode: str):
    """Reads a file of judgements and takes its numbers."""
    return lambda file: benchmarks.numbers_of(mode, benchmarks.read_judgements(mode, (file,)), seed=0)


READERS = {
    "responses": (judge.read_responses, [{"prompt": Q, "response": A, "model": "m"}, ARENA]),
    "alpaca": (judge.read_responses, [{"instruction": Q, "output": A, "generator": "m"}]),
    "pairs": (length_controlled.read_pairs, [JUDGED, ALPACA]),
    "mt-bench answers": (benchmarks.read_mt_bench_answers, [ANSWER]),
    "mt-bench questions": (benchmarks.read_mt_bench_questions, [TURNS]),
    "arena questions": (benchmarks.read_arena_questions, [{"uid": "1", "category": "hard", "prompt": "q"}]),
    "fastchat prompts": (
        benchmarks.read_fastchat_prompts,
        [{"name": name, "prompt_template": "{question}"} for name in benchmarks.PROMPT_NAMES.values()],
    ),
    "mt-bench": (numbers("mt-bench"), [SINGLE]),
    "mt-bench-pairwise": (numbers("mt-bench-pairwise"), [DOUBLE]),
    "arena-hard": (numbers("arena-hard"), [GAMES]),
}

DEEP = [[]]
for _ in range(60):
    DEEP = [DEEP]
# What a value of a row may be instead. NAN and the like are written as Python's json does.
ODD = [
    None,
    True,
    False,
    0,
    3,
    -1.5,
    math.nan,
    math.inf,
    -math.inf,
    10**400,
    10**18,
    1e308,
    "",
    " ",
    "\n",
    "text",
]
ODD += [
    "\ud800",
    "\u0000",
    "\u202e",
    "🥣",
    "x" * 20_000,
    "{",
    "[{",
    "[[]]",
    '[{"role": "user"}]',
    "null",
    "NaN",
]
ODD += [
    '[{"role": "user", "content": 3}]',
    '[{"role": "user", "content": "x"}, 3]',
    "\n\nHuman: x\n\nAssistant:",
]
ODD += [[], {}, [[]], [None], [3], [""], ["a", "b"], [{}], [None, {}], {"a": 1}, {"role": "user"}, DEEP]
ODD += [[{"role": "user", "content": "x"}], [{"role": "user", "content": 3}], [{"role": 3, "content": "x"}]]
ODD += [[{"role": "user", "content": ["x"]}], [{"role": "user", "content": [{"type": "image"}]}]]
ODD += [[{"role": "user", "content": "x", "tool_calls": 3}], [{"role": ["user"], "content": "x"}]]
ODD += [
    [{"from": "human", "value": None}],
    [{"input": 3, "output": []}],
    [{"role": "assistant", "content": "x"}],
]
NAMES = [
    "prompt",
    "response",
    "chosen",
    "rejected",
    "reward",
    "label",
    "messages",
    "completions",
    "answers",
    "tools",
]
NAMES += [
    "split",
    "row",
    "system",
    "text",
    "instruction",
    "split_by",
    "winner",
    "policy",
    "turns",
    "prompt_ids",
    "",
]


class Outcome(NamedTuple):
    """What became of a case. `wrong`: "" where it is as it should be, else what is wrong."""

    number: int
    what: str
    refused: str
    wrong: str


# --- files ----------------------------------------------------------------------------------------------------


def with_number(value, i: int):
    """A copy of a row, or of what is read of it, whose texts tell which row it is."""
    text = json.dumps(value)
    for one, other in ((Q, f"What is warm {i}?"), (A, f"Soup {i} is."), (B, f"Ice {i} is.")):
        text = text.replace(json.dumps(one)[1:-1], json.dumps(other)[1:-1])
    return json.loads(text)


def write(draw: random.Random, folder: Path, rows: list, how: str) -> str:
    """A file of `rows` as `how` says; a name of its own, as the readers keep none."""
    path = folder / f"data.{how}"
    ascii_alone = draw.random() < 0.5
    lines = [json.dumps(row, ensure_ascii=ascii_alone) for row in rows]
    if how == "parquet":
        import datasets

        columns = {column: None for row in rows for column in row}  # it takes those of the first row alone
        datasets.Dataset.from_list([{**columns, **row} for row in rows]).to_parquet(str(path))
        return str(path)
    if how.startswith("jsonl"):
        text = "\n".join(lines) + draw.choice(["", "\n", "\n\n", " \n"])
    else:
        text = json.dumps(rows, ensure_ascii=ascii_alone, indent=draw.choice([None, 1]))
    content = text.encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(content) if how.endswith(".gz") else content)
    return str(path)


# --- mutations ------------------------------------------------------------------------------------------------


def kept(draw: random.Random, rows: list[dict]) -> tuple[str, list]:
    """The same rows in another way. (what was done, rows; of .jsonl alone also lines as text)"""
    what = draw.choice(["nothing", "order of keys", "a column more", "a null more"])
    changed = copy.deepcopy(rows)
    for i, row in enumerate(changed):
        if what == "order of keys":
            keys = draw.sample(sorted(row), len(row))
            changed[i] = {key: row[key] for key in keys}
        elif what == "a column more":
            row["zzz"] = draw.choice(["x", 3, ["x"], {"deep": {"deeper": [1]}}])
        elif what == "a null more":
            row["zzz"] = None
    return what, changed


def places(value, path=()) -> list[tuple]:
    """The paths to all values in a row."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        found += places(each, (*path, key))
    return found


def spoil(draw: random.Random, row):
    """(what was done, the row with one or two values changed, removed, renamed, wrapped, doubled or added)."""
    row = copy.deepcopy(row)
    done = []
    for _ in range(draw.choice([1, 1, 2])):
        path = draw.choice(places(row) or [()])
        if not path or draw.random() < 0.03:
            row = draw.choice(ODD)
            done.append(f"row = {row!r:.40}")
            return ", ".join(done), row
        at = row
        for key in path[:-1]:
            at = at[key]
        key = path[-1]
        how = draw.choice(["odd"] * 6 + ["remove", "rename", "wrap", "double", "add"])
        if how == "odd":
            at[key] = copy.deepcopy(draw.choice(ODD))
        elif how == "remove":
            del at[key]
        elif how == "wrap":
            at[key] = draw.choice([[at[key]], {"x": at[key]}, json.dumps(at[key])])
        elif how == "rename" and isinstance(at, dict):
            at[draw.choice(NAMES)] = at.pop(key)
        elif how == "double" and isinstance(at, list):
            at.insert(key, copy.deepcopy(at[key]))
        else:
            row[draw.choice(NAMES)] = copy.deepcopy(draw.choice(ODD))
        done.append(f"{how} {'.'.join(map(str, path))}")
    return ", ".join(done), row


def spoil_bytes(draw: random.Random, path: Path) -> str:
    """What was done to the bytes of a file."""
    content = bytearray(path.read_bytes())
    ways = ["cut", "cut", "flip", "flip", "zeros", "insert", "utf-16", "latin-1", "empty", "suffix", "twice"]
    how = draw.choice([*ways, "key twice"] if path.suffix in (".json", ".jsonl") else ways)
    at = draw.randrange(len(content))
    if how == "cut":
        del content[at:]
    elif how == "flip":
        content[at] ^= 1 << draw.randrange(8)
    elif how == "zeros":
        content[at : at + 8] = bytes(8)
    elif how == "insert":
        content[at:at] = draw.choice([b"\xff\xfe", b"\xc3", b"\n", b"}", b"\xed\xa0\x80", b"\x00"])
    elif how in ("utf-16", "latin-1"):
        content = bytearray(bytes(content).decode("latin-1").replace("is.", "is é.").encode(how))
    elif how == "empty":
        content.clear()
    elif how == "suffix":  # gzip that is not called so, and what is called gzip and is none
        content = bytearray(gzip.compress(bytes(content)))
    elif how == "key twice":
        content = bytearray(bytes(content).replace(b"{", b'{"zzz": 1, "zzz": 2, ', 1))
    elif how == "twice":
        content = content * 2
    path.write_bytes(bytes(content))
    return how


# --- verdicts -------------------------------------------------------------------------------------------------


def call(read, *arguments, **options):
    """(what it gave, the line it ended with, what is wrong with how it ended)."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return read(*arguments, **options), "", ""
    except SystemExit as end:
        line = str(end.code)
        one = isinstance(end.code, str) and line.startswith("error: ") and len(line.splitlines()) == 1
        return None, line, "" if one else f"no line of an error: {line!r}"
    except BaseException:
        return None, "", traceback.format_exc()


def fault_of(row: dict, kind: str) -> str:
    """Why a row that was read is none that can be trained on."""
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        fields = {key: row.get(key) for key in (*KINDS[kind], "tools")}  # others are the reward function's
        try:
            json.dumps(fields, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            return "no UTF-8"
    for column in KINDS[kind]:
        value = row.get(column)
        if column == "reward":
            good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        elif column == "label":
            good = isinstance(value, bool)
        elif isinstance(value, list):
            good = bool(value) and all(isinstance(message.get("content"), str) for message in value)
        else:
            good = isinstance(value, str) and bool(value.strip())
        if not good:
            return f"{column} is {value!r:.60}"
    return ""


def read_all(file: str, each: Format, tokenizer, skip_bad_rows: bool) -> list[dict]:
    """As a script reads them, with tokens."""
    rows = read_rows(file, each.kind, columns=each.columns, skip_bad_rows=skip_bad_rows)
    fields = [column for column in KINDS[each.kind] if column not in ("prompt", "reward", "label")]
    tokenize(copy.deepcopy(rows), tokenizer, tuple(fields), 10**6, 10**6, file, skip_bad_rows)
    return rows


def differs(rows: list[dict], expected: dict[int, list[dict]]) -> str:
    """What is not as in `expected`: number of a row -> what is to be read of it."""
    for number, wanted in expected.items():
        found = [row for row in rows if row["row"] == number]
        # Arrow gives a nested value the keys of all rows; our own columns must be the same
        cut = [{key: row.get(key) for key in want} for row, want in zip(found, wanted, strict=False)]
        if len(found) != len(wanted) or cut != wanted:
            return f"row {number}: {found!r:.300} is not {wanted!r:.300}"
    return ""


def of_training(number: int, folder: Path, tokenizer) -> Outcome:
    """A case of the files that scripts read."""
    draw = random.Random(number)
    each = draw.choice(READ + OURS * 5)
    rows = [with_number(each.row, i) for i in range(1, ROWS + 1)]
    expected = {i: with_number(each.found, i) for i in range(1, ROWS + 1)}
    mutation = draw.choice(["kept", "row", "row", "row", "bytes"])
    how = draw.choice(["jsonl"] * 4 + ["json", "jsonl.gz", "json.gz", "parquet", "parquet"])
    spoilt = None
    if mutation == "kept":
        what, rows = kept(draw, rows)
    elif mutation == "row":
        spoilt = draw.randrange(1, ROWS + 1)
        what, rows[spoilt - 1] = spoil(draw, rows[spoilt - 1])
        if isinstance(rows[spoilt - 1], list):  # a list on a line counts as its items: as an object it is one
            rows[spoilt - 1] = {"row": rows[spoilt - 1]}
        del expected[spoilt]
    try:
        file = write(draw, folder, rows, how)
    except Exception as error:  # no parquet file can hold it: mixed types, half characters
        if how != "parquet":
            raise
        how = f"jsonl ({type(error).__name__} as parquet)"
        file = write(draw, folder, rows, "jsonl")
    if mutation == "bytes":
        what = spoil_bytes(draw, Path(file))
    name = f"{each.name} ({each.kind}), .{how}, {mutation}: {what}"
    if spoilt:
        name += f" in row {spoilt}"
    skip = mutation == "row" and draw.random() < 0.4
    found, refused, wrong = call(read_all, file, each, tokenizer, skip)
    if not wrong:
        wrong = verdict(each, mutation, what, spoilt, skip, file, found, refused, expected)
    return Outcome(number, name + skip * " (skipped)", refused, wrong)


def verdict(each, mutation, what, spoilt, skip, file, found, refused, expected) -> str:
    """What is wrong with what a file gave."""
    if refused:
        named = re.search(r", row (\d+)", refused)
        if mutation == "kept":
            return f"refused: {refused}"
        if file not in refused and "--columns" not in refused and "of its tokens are unknown" not in refused:
            return f"the file is not named: {refused}"
        # in a parquet file a column that one row has is one of all
        if mutation == "row" and named and int(named[1]) != spoilt and not file.endswith(".parquet"):
            return f"the wrong row is named: {refused}"
        # a `split` in one row alone makes the others those that lack it
        about_all = "no usable row" in refused or "no row whose" in refused or "unknown" in refused
        if skip and not about_all and "--columns" not in refused:
            return f"with --skip-bad-rows: {refused}"
        return ""
    for row in found:
        fault = fault_of(row, each.kind)
        if fault:
            return f"row {row['row']} was read: {fault}"
    if mutation == "bytes":
        return "a key stands twice" if "key twice" in what else ""
    return differs(found, expected)


def of_evaluation(number: int, folder: Path) -> Outcome:
    """A case of the files that evaluate.py reads."""
    draw = random.Random(number)
    name = draw.choice(sorted(READERS))
    read, bases = READERS[name]
    rows = copy.deepcopy(bases if len(bases) > 2 else [draw.choice(bases)] * 3)
    how = draw.choice(["jsonl", "jsonl", "json", "jsonl.gz"])
    mutation = draw.choice(["row"] * 5 + ["bytes"])
    spoilt = draw.randrange(1, len(rows) + 1)
    if mutation == "row":
        what, rows[spoilt - 1] = spoil(draw, rows[spoilt - 1])
    file = write(draw, folder, rows, how)
    if mutation == "bytes":
        what = spoil_bytes(draw, Path(file))
    _, refused, wrong = call(read, file)
    named = re.search(r", row (\d+)", refused)
    if not wrong and mutation == "row" and named and int(named[1]) != spoilt and "row = [" not in what:
        wrong = f"the wrong row is named: {refused}"
    return Outcome(number, f"evaluate's {name}, .{how}, {mutation}: {what} in row {spoilt}", refused, wrong)


def case(number: int, tokenizer) -> Outcome:
    """The verdict on one case; every fourth is a file of evaluate.py."""
    with tempfile.TemporaryDirectory() as folder:
        if number % 4 == 3:
            return of_evaluation(number, Path(folder))
        return of_training(number, Path(folder), tokenizer)


def cases(numbers) -> list[Outcome]:
    """Of each number its verdict."""
    import datasets

    datasets.disable_progress_bars()
    tokenizer = chat_templates.tokenizer(TEMPLATE)
    return [case(number, tokenizer) for number in numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT, help="number of files")
    parser.add_argument("--only", type=int, help="this one alone")
    options = parser.parse_args()
    outcomes = cases([options.only] if options.only is not None else range(options.count))
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    for outcome in outcomes if options.only is not None else wrong:
        print(f"{outcome.number}: {outcome.what}\n    {outcome.refused}\n    {outcome.wrong}")
    refused = sum(bool(outcome.refused) for outcome in outcomes)
    print(f"{len(outcomes)} files: {refused} refused, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
