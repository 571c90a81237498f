"""The files of AlpacaEval, MT-Bench and Arena-Hard: the answers they read, the judgements they write, and the
numbers they compute from those.

Read from the sources of alpaca_eval, FastChat 0.2.36 (fastchat/llm_judge) and arena-hard-auto v2.0
(lmarena/arena-hard-auto: gen_answer.py, gen_judgment.py, show_result.py). docs/evaluate_judge.md says what is
the same there and here."""

import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np

from common.cli import fail, note
from common.data import Unreadable, read_file
from common.formats import is_finite_number
from evaluation.verdicts import FIVE
from evaluation.win_rates import clustered_average, ratio


def as_lines(rows: list[dict]) -> str:
    """The rows as JSON, one per line. Half a surrogate pair, which UTF-8 cannot hold, stays JSON's \\ud800."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# --- answers -------------------------------------------------------------------------------------------


def export(folder: Path, name: str, rows: list[dict], records: list[dict], dataset: str) -> None:
    """Writes the answers in the forms that three benchmarks read: alpaca_eval.json (the first turn),
    mt_bench.jsonl (all turns, a choice for each sample; FastChat's llm_judge) and arena_hard.jsonl (the first
    turn; arena-hard-auto v2.0). `records` are those of `rows`, row by row and turn by turn."""
    alpaca = []
    mt_bench = []
    arena_hard = []
    texts = [record["response"] for record in records]
    start = 0
    for row in rows:
        end = start + len(row["turns"])
        turns = texts[start:end]
        start = end
        if row["sample"] > 0:  # its question is the last one written
            mt_bench[-1]["choices"].append({"index": row["sample"], "turns": turns})
            continue
        prompt = row["prompt"]
        messages = prompt
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        else:
            prompt = "\n".join(message["content"] for message in prompt)
        instruction = {
            "instruction": prompt,
            "output": turns[0],
            "generator": name,
            "dataset": row.get("dataset", dataset),
        }
        alpaca.append(instruction)
        answer_id = hashlib.sha256(json.dumps([name, prompt, turns]).encode()).hexdigest()[:22]
        now = time.time()
        conversation = {
            "question_id": row.get("question_id", row["row"]),
            "answer_id": answer_id,
            "model_id": name,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": now,
        }
        mt_bench.append(conversation)
        # Without `metadata` (token_len by tiktoken, counts of markdown), which style control alone reads:
        # the tool's own utils/add_markdown_info.py adds it.
        answer = {
            "uid": row.get("uid", str(row.get("question_id", row["row"]))),
            "ans_id": answer_id,
            "model": name,
            "messages": [*messages, {"role": "assistant", "content": {"answer": turns[0]}}],
            "tstamp": now,
        }
        arena_hard.append(answer)
    alpaca_text = json.dumps(alpaca, indent=1, ensure_ascii=False)
    (folder / "alpaca_eval.json").write_text(alpaca_text, encoding="utf-8")
    (folder / "mt_bench.jsonl").write_text(as_lines(mt_bench), encoding="utf-8")
    (folder / "arena_hard.jsonl").write_text(as_lines(arena_hard), encoding="utf-8")


# --- what is read --------------------------------------------------------------------------------------


# Columns that name something: rows are grouped by them.
NAMES = ("question_id", "uid", "name", "category", "model", "model_1", "model_2", "baseline")


def read_objects(file: str, columns: tuple[str, ...]) -> list[dict]:
    """The rows of a local file, each an object with these columns. Ends the run at one without, or with a name
    that is neither text nor a whole number."""
    if not Path(file).is_file():
        fail(f"{file}: no such file")
    rows = read_file(file, "")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            fail(f"{file}, row {number}: {row if isinstance(row, Unreadable) else 'no object with columns'}")
        missing = [column for column in columns if column not in row]
        if missing:
            fail(f"{file}, row {number}: no {missing[0]!r} among the columns {', '.join(sorted(row))}")
        for column in NAMES:
            name = row.get(column)
            if not isinstance(name, str | int) and (column in columns or name is not None):
                fail(f"{file}, row {number}: {column} is {repr(name)[:40]}, neither text nor a whole number")
    if not rows:
        fail(f"{file}: no rows")
    return rows


def turns_of(row: dict, where: str) -> list[str]:
    """The turns of the first choice of an answer of MT-Bench; others, of more samples, are not judged."""
    choices = row["choices"]
    choice = choices[0] if isinstance(choices, list) and choices else None
    turns = choice.get("turns") if isinstance(choice, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, (str, int, float)) for turn in turns):
        fail(f"{where}: no choices with turns of text, as FastChat's model_answer has them")
    return [str(turn) for turn in turns]  # some references are numbers


def read_mt_bench_answers(file: str) -> tuple[str, dict]:
    """(the model's name or "" where rows name several, question_id -> its turns) of a file in FastChat's
    model_answer form, mt_bench.jsonl. The last row of a question counts, as in FastChat."""
    answers = {}
    names = set()
    rows = read_objects(file, ("question_id", "choices"))
    further = 0  # choices, of more samples
    for number, row in enumerate(rows, 1):
        answers[row["question_id"]] = turns_of(row, f"{file}, row {number}")
        further += len(row["choices"]) - 1
        names.add(str(row.get("model_id", "")))
    if further:
        note(f"{file}: left out {further} further choices: the first of a question is judged")
    if len(answers) < len(rows):
        note(f"{file}: left out {len(rows) - len(answers)} rows: the last one of a question counts")
    return names.pop() if len(names) == 1 else "", answers


def read_mt_bench_questions(file: str) -> dict:
    """question_id -> row of FastChat's question.jsonl, with `category` and one or two `turns`."""
    questions = {}
    for number, row in enumerate(read_objects(file, ("question_id", "category", "turns")), 1):
        turns = row["turns"]
        texts = isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
        if not texts or len(turns) not in (1, 2):
            fail(f"{file}, row {number}: turns must be one or two texts")
        questions[row["question_id"]] = row
    return questions


def read_arena_questions(file: str) -> dict[str, tuple[str, str]]:
    """prompt -> (uid, category) of arena-hard-auto's question.jsonl."""
    found = {}
    for row in read_objects(file, ("uid", "category", "prompt")):
        found[str(row["prompt"])] = (str(row["uid"]), str(row["category"]))
    return found


def read_fastchat_prompts(file: str) -> dict[str, tuple[str, str]]:
    """name -> (system prompt, prompt) of FastChat's data/judge_prompts.jsonl. Ends the run where one that
    MT-Bench needs is missing."""
    prompts = {}
    for number, row in enumerate(read_objects(file, ("name", "prompt_template")), 1):
        texts = (row.get("system_prompt") or "", row["prompt_template"])
        if not all(isinstance(text, str) for text in texts):
            fail(f"--template {file}, row {number}: system_prompt and prompt_template must be texts")
        prompts[row["name"]] = texts
    missing = sorted(set(PROMPT_NAMES.values()) - set(prompts))
    if missing:
        fail(
            f"--template {file}: it lacks {', '.join(missing)}; MT-Bench's is FastChat's judge_prompts.jsonl"
        )
    return prompts


# --- MT-Bench ------------------------------------------------------------------------------------------

WITH_REFERENCE = ("math", "reasoning", "coding")  # FastChat's NEED_REF_CATS
# (pairwise, turn, with a reference) -> the name of FastChat's prompt
PROMPT_NAMES = {
    (False, 1, False): "single-v1",
    (False, 1, True): "single-math-v1",
    (False, 2, False): "single-v1-multi-turn",
    (False, 2, True): "single-math-v1-multi-turn",
    (True, 1, False): "pair-v2",
    (True, 1, True): "pair-math-v1",
    (True, 2, False): "pair-v2-multi-turn",
    (True, 2, True): "pair-math-v1-multi-turn",
}
NO_SCORE = -1  # FastChat's score of an answer without one


def mt_bench_scores(judgements: list[dict]) -> dict:
    """What FastChat's show_result says of one model's rows of model_judgment/*_single.jsonl: the mean by turn
    and over all judgements of both turns, those without a score left out; and the same by category, where the
    rows have it. Intervals take the two turns of a question together."""
    scored = [row for row in judgements if row["score"] != NO_SCORE]

    def of(rows: list[dict]) -> dict:
        return clustered_average([row["score"] for row in rows], [row["question_id"] for row in rows])

    categories = sorted({row["category"] for row in scored if row.get("category")})
    return {
        **of(scored),
        "turn_1": of([row for row in scored if row["turn"] == 1]),
        "turn_2": of([row for row in scored if row["turn"] == 2]),
        "categories": {
            name: of([row for row in scored if row.get("category") == name]) for name in categories
        },
        "unparsable": len(judgements) - len(scored),
    }


def mt_bench_pairs(judgements: list[dict]) -> dict:
    """What FastChat's show_result says of the first model in rows of model_judgment/*_pair.jsonl: a win or a
    loss where both orders say so, else a tie; rows with an unparsable verdict are left out. Overall, by turn
    and by category."""
    known = [row for row in judgements if "error" not in (row["g1_winner"], row["g2_winner"])]

    def of(rows: list[dict]) -> dict:
        both = [row["g1_winner"] for row in rows if row["g1_winner"] == row["g2_winner"]]
        wins = both.count("model_1")
        losses = both.count("model_2")
        ties = len(rows) - wins - losses
        return {
            "n": len(rows),
            "win": wins,
            "loss": losses,
            "tie": ties,
            "win_rate": ratio(wins, len(rows)),
            "loss_rate": ratio(losses, len(rows)),
            "win_rate_adjusted": ratio(wins + 0.5 * ties, len(rows)),
        }

    categories = sorted({row["category"] for row in known if row.get("category")})
    return {
        **of(known),
        "turn_1": of([row for row in known if row["turn"] == 1]),
        "turn_2": of([row for row in known if row["turn"] == 2]),
        "categories": {
            name: of([row for row in known if row.get("category") == name]) for name in categories
        },
        "unparsable": len(judgements) - len(known),
    }


# --- Arena-Hard ----------------------------------------------------------------------------------------

WEIGHT = 3  # how often a strong verdict counts, load_judgments(..., weight=3)
# A verdict -> what the answer that stands as A gets: load_judgments' label_to_score.
LEVELS = {
    "A>>B": [1.0] * WEIGHT,
    "A>B": [1.0],
    "A=B": [0.5],
    "B>A": [0.0],
    "B>>A": [0.0] * WEIGHT,
}
DRAWS = 1000  # of the bootstrap; show_result draws 100


def arena_scores(games: list) -> list[float] | None:
    """The model's scores in a row of model_judgment: in its first game the baseline stands as A, in its second
    the model. None where a verdict is missing."""
    verdicts = [game.get("score") if game else None for game in games]
    if len(verdicts) != 2 or None in verdicts:
        return None
    baseline_first, model_first = (LEVELS[FIVE[verdict]] for verdict in verdicts)
    return model_first + [1 - score for score in baseline_first]


def arena_hard_rate(judgements: list[dict], seed: int = 0) -> dict:
    """The win rate of one model against its baseline, from rows of model_judgment of one category: the mean
    of all scores, a strong verdict three times among them. show_result prints the mean of its 100 bootstrap
    means instead, which has no seed and differs by the noise of the drawing.

    `ci95` draws prompts with replacement. `ci90_of_scores` draws single scores, as show_result does: it takes
    the three of a strong verdict for three prompts, and is narrower."""
    of_rows = [arena_scores(row["games"]) for row in judgements]
    known = [scores for scores in of_rows if scores is not None]
    counts = {"n": len(known), "unparsable": len(of_rows) - len(known)}
    if not known:
        nothing = [math.nan, math.nan]
        return {**counts, "win_rate": math.nan, "ci95": nothing, "ci90_of_scores": nothing}
    random = np.random.default_rng(seed)
    sums = np.array([sum(scores) for scores in known])  # [prompts]
    lengths = np.array([len(scores) for scores in known])  # [prompts]
    drawn = random.integers(len(known), size=(DRAWS, len(known)))  # [draws, prompts]
    of_prompts = sums[drawn].sum(1) / lengths[drawn].sum(1)  # [draws]
    scores = np.concatenate([np.array(scores) for scores in known])
    of_scores = [random.choice(scores, len(scores)).mean() for _ in range(DRAWS)]
    return {
        **counts,
        "win_rate": float(scores.mean()),
        "ci95": np.quantile(of_prompts, [0.025, 0.975]).tolist(),
        "ci90_of_scores": np.quantile(of_scores, [0.05, 0.95]).tolist(),
    }


# --- judgements made elsewhere -------------------------------------------------------------------------

COLUMNS = {
    "mt-bench": ("question_id", "model", "judge", "score", "turn"),
    "mt-bench-pairwise": ("question_id", "model_1", "model_2", "g1_winner", "g2_winner", "judge", "turn"),
    "arena-hard": ("uid", "category", "judge", "model", "games"),
}


def read_judgements(mode: str, files: tuple[str, ...]) -> list[dict]:
    """The rows of files that FastChat (*_single.jsonl, *_pair.jsonl) or arena-hard-auto (model_judgment/*/*.jsonl)
    wrote, checked. Ends the run where a row is none of them."""
    winners = ("model_1", "model_2", "tie", "error")
    found = []
    for file in files:
        for number, row in enumerate(read_objects(file, COLUMNS[mode]), 1):
            where = f"{file}, row {number}"
            if mode == "arena-hard":
                games = row["games"]
                if not isinstance(games, list) or len(games) != 2:
                    fail(f"{where}: games must be two, one in each order")
                for game in games:
                    if not isinstance(game, dict | None):
                        fail(f"{where}: a game is {type(game).__name__}, not an object with its score")
                    score = game.get("score") if game else None
                    if score is not None and not (isinstance(score, str) and score in FIVE):
                        fail(f"{where}: the verdict {str(score)[:40]!r} is none of {', '.join(LEVELS)}")
            elif mode == "mt-bench-pairwise":
                if row["g1_winner"] not in winners or row["g2_winner"] not in winners:
                    fail(f"{where}: a winner is none of {', '.join(winners)}")
            elif not is_finite_number(row["score"]):
                fail(f"{where}: score is {str(row['score'])[:40]!r}, no finite number")
            found.append(row)
    return found


def judge_of(row: dict) -> str:
    """Who judged a row: FastChat also names the prompt, [judge, prompt]."""
    judge = row["judge"]
    return str(judge[0] if isinstance(judge, list) else judge)


def numbers_of(mode: str, judgements: list[dict], seed: int) -> dict[tuple[str, ...], dict]:
    """(judge, model, the other model or "", category or "") -> its numbers."""
    groups = {}
    for row in judgements:
        if mode == "mt-bench":
            key = (judge_of(row), row["model"], "", "")
        elif mode == "mt-bench-pairwise":
            key = (judge_of(row), row["model_1"], row["model_2"], "")
        else:  # categories have baselines of their own
            key = (judge_of(row), row["model"], row.get("baseline", ""), row["category"])
        groups.setdefault(key, []).append(row)
    if mode == "mt-bench":
        return {key: mt_bench_scores(rows) for key, rows in groups.items()}
    if mode == "mt-bench-pairwise":
        return {key: mt_bench_pairs(rows) for key, rows in groups.items()}
    return {key: arena_hard_rate(rows, seed) for key, rows in groups.items()}
