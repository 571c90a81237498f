"""`evaluate.py judge`: language models as judges, behind any OpenAI-compatible endpoints.

Here are the flags, what is judged, and the report. verdicts.py has the prompts and reads the answers, asking.py
calls the judges and keeps what they said, win_rates.py has the numbers, benchmarks.py what MT-Bench and Arena-Hard
do otherwise. docs/evaluate_judge.md explains them."""

import collections
import dataclasses
import hashlib
import itertools
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from common.cli import fail, make_folder, note
from common.data import Unreadable, check_row, prompt_hash, read_file
from common.lock import lock
from common.tables import markdown
from common.templates import text_of
from evaluation import benchmarks, verdicts
from evaluation.asking import (
    Cache,
    Endpoint,
    ask_all,
    estimate,
    make_endpoint,
    messages_of,
    question_key,
    read_answers,
)
from evaluation.verdicts import Mode, fill, parse_verdict
from evaluation.win_rates import agreement, average, outcome, pair_points, pairwise_summary


@dataclass
class Judge:
    """Asks language models which of two files of responses is better, or for scores; also as MT-Bench and
    Arena-Hard do."""

    responses: tuple[str, ...] = ()
    """Files of prompt, response (.jsonl, .json, .parquet), of alpaca_eval's instruction, output, or of
    Arena-Hard's uid, messages; for MT-Bench of FastChat's question_id, choices. Where responses are compared, the
    first file with each of the others; for scores any number."""
    judge_model: tuple[str, ...] = ()
    """Name of the judge at the endpoint; several judge one after another."""
    endpoint: tuple[str, ...] = ("http://localhost:8000/v1",)
    """Address of any OpenAI-compatible server; one for all judges, or one for each."""
    key_variable: tuple[str, ...] = ("OPENAI_API_KEY",)
    """Environment variable with the key for the endpoint; one for all judges, or one for each."""
    mode: Mode = "pairwise"
    """pairwise: A, B or neutral, each pair in both orders; score: 1 to 5, each response by itself; mt-bench: 1 to
    10, each turn; mt-bench-pairwise: each turn in both orders; arena-hard: A>>B, A>B, A=B, B>A or B>>A, in both
    orders."""
    questions: str = ""
    """MT-Bench: FastChat's question.jsonl. Arena-Hard: its question.jsonl, for uid and category; may be left
    out."""
    references: str = ""
    """MT-Bench: reference answers to math, reasoning and coding, FastChat's reference_answer/gpt-4.jsonl."""
    judgements: tuple[str, ...] = ()
    """Files of judgements that FastChat (*_single.jsonl, *_pair.jsonl) or arena-hard-auto (model_judgment) wrote:
    their numbers by `--mode` mt-bench, mt-bench-pairwise or arena-hard, and nothing is asked."""
    template: str = ""
    """File with a prompt of your own: {prompt}, and {answer_a} and {answer_b}, or {answer} for scores; for MT-Bench
    FastChat's judge_prompts.jsonl. By default ours is used."""
    dry_run: bool = False
    """Say what would be asked, and about how many tokens that is, and end."""
    run_dir: str = "runs/judge"
    """Folder of judgements.jsonl (the cache), verdicts.jsonl, results.jsonl and judge.json."""
    prompts: int = 0
    """Number of prompts (for MT-Bench questions) to judge, drawn by `--seed`. 0: all."""
    seed: int = 0
    """Seed of the prompts drawn, of their order, and of which order of a pair is asked first."""
    temperature: float = 0.0
    """Temperature of the judges."""
    max_tokens: int = 1024
    """Longest answer of a judge, in tokens, its reasoning included."""
    extra: str = "{}"
    """JSON that is added to each request; null takes a field out: {"max_tokens": null,
    "max_completion_tokens": 4096}."""
    concurrency: int = 8
    """Number of questions that are under way at the same time."""
    timeout: float = 120.0
    """Seconds for one try, from connecting to the last byte."""
    tries: int = 6
    """Tries per question and judge, in one run of this command."""
    backoff: float = 1.0
    """Longest wait, in seconds, before the second try (random down to half of it); doubled for each
    further one."""
    max_wait: float = 120.0
    """Longest pause between two tries, in seconds. A server that asks for a longer one (Retry-After) gets
    no further try."""
    retry_unparsable: bool = False
    """Ask again where a judge's answer had no verdict or score. At temperature 0 most answers stay the
    same."""


# --- arguments -----------------------------------------------------------------------------------------


def check(args: Judge) -> None:
    """Ends the run where the arguments make no sense."""
    pairwise = args.mode in verdicts.PAIRS
    if not args.judge_model:
        fail("--judge-model: name a judge")
    if not args.responses:
        fail("--responses: give files of responses")
    if pairwise and len(args.responses) < 2:
        fail(f"--responses: {args.mode} takes two files or more, not {len(args.responses)}")
    if len(set(args.responses)) < len(args.responses):
        fail("--responses: a file is named twice")
    if len({file_name(name) for name in args.judge_model}) < len(args.judge_model):
        fail("--judge-model: a judge is named twice, or two by names that give the same file")
    for flag, values in (("--endpoint", args.endpoint), ("--key-variable", args.key_variable)):
        if len(values) not in (1, len(args.judge_model)):
            fail(f"{flag}: give one for all judges, or one for each of the {len(args.judge_model)}")
    above_zero = min(args.concurrency, args.tries, args.timeout) > 0
    not_below_zero = min(args.prompts, args.backoff, args.max_wait) >= 0
    if not above_zero or not not_below_zero:
        flags = "--concurrency, --tries and --timeout must be above 0"
        fail(f"{flags}, --prompts, --backoff and --max-wait not below")
    mt_bench = args.mode in verdicts.MT_BENCH
    if mt_bench and not args.questions:
        fail(f"--mode {args.mode} needs FastChat's question.jsonl: --questions")
    if args.questions and not (mt_bench or args.mode == "arena-hard"):
        fail(f"--questions is for MT-Bench and Arena-Hard; --mode is {args.mode}")
    if args.references and not mt_bench:
        fail(f"--references is for MT-Bench; --mode is {args.mode}")


def endpoints(args: Judge) -> list[Endpoint]:
    """The judges. Ends the run where a key would go to two servers."""
    count = len(args.judge_model)
    addresses = args.endpoint * count if len(args.endpoint) == 1 else args.endpoint
    variables = args.key_variable * count if len(args.key_variable) == 1 else args.key_variable
    judges = [make_endpoint(*each) for each in zip(args.judge_model, addresses, variables, strict=True)]
    if len(args.key_variable) == 1 and judges[0].key and len({judge.url for judge in judges}) > 1:
        fail(
            f"--key-variable: the key in {variables[0]} would go to several servers; name one for each judge"
        )
    secrets = {secret for judge in judges for secret in judge.secrets}
    every = tuple(sorted(secrets, key=len, reverse=True))  # no judge's answer may hold another's key
    return [dataclasses.replace(judge, secrets=every) for judge in judges]


def read_template(args: Judge) -> str:
    """The prompt of `--template`, or ours, of the modes that have one prompt. Ends the run where a part is
    missing in it."""
    ours = {"pairwise": verdicts.PAIRWISE, "score": verdicts.SCORE, "arena-hard": verdicts.FIVE_LEVELS}
    template = ours[args.mode]
    if args.template:
        if not Path(args.template).is_file():
            fail(f"--template {args.template}: no such file")
        template = Path(args.template).read_text(encoding="utf-8")
    parts = ["{prompt}", "{answer}"]
    if args.mode in verdicts.PAIRS:
        parts = ["{prompt}", "{answer_a}", "{answer_b}"]
    missing = [part for part in parts if part not in template]
    if missing:
        fail(f"--template {args.template}: for {args.mode} it must hold {', '.join(missing)}")
    return template


def sampling_settings(args: Judge) -> dict:
    """What each request holds besides model and messages. Ends the run where `--extra` is no JSON object."""
    try:
        extra = json.loads(args.extra)
        settings = {"temperature": args.temperature, "max_tokens": args.max_tokens} | extra
    except (ValueError, TypeError):
        fail(f"--extra {args.extra}: not a JSON object")
    return {key: value for key, value in settings.items() if value is not None}


# --- responses -----------------------------------------------------------------------------------------


def prompt_text(prompt: str | list[dict]) -> str:
    """A prompt as text: messages with their roles, but one message of the user as its text alone."""
    if isinstance(prompt, str):
        return prompt
    if [message["role"] for message in prompt] == ["user"]:
        return str(prompt[0]["content"])
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)


def arena_answer(row: dict) -> dict:
    """A row of Arena-Hard's answers as prompt and response. As in its gen_judgment.py a system message is not
    shown to the judge."""
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return {}
    if not all(isinstance(message, dict) for message in messages):
        return {}
    content = messages[-1].get("content")
    if isinstance(content, dict):
        content = content.get("answer")
    prompt = [message for message in messages[:-1] if message.get("role") != "system"]
    return {"prompt": prompt, "response": content}


def read_responses(file: str) -> tuple[str, dict[str, str]]:
    """(the model's name or "", prompt, as text, to the file's first response to it). An empty response is one
    too: the judge is to see it. Ends the run at a row without prompt or response."""
    if not Path(file).is_file():
        fail(f"{file}: no such file")
    rows = read_file(file, "")
    responses = {}
    names = set()
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            fail(
                f"{file}, row {number}: {row if isinstance(row, Unreadable) else 'no object with named columns'}"
            )
        name = row.get("model", row.get("generator"))
        names.add(name if isinstance(name, str) else "")
        if "instruction" in row and "prompt" not in row:  # alpaca_eval's
            row = {"prompt": row["instruction"], "response": row.get("output")}
        elif "uid" in row and "messages" in row and "prompt" not in row:
            row = arena_answer(row)
        empty = isinstance(row.get("response"), str) and not row["response"].strip()
        kind = "prompts" if empty else "responses"  # of "prompts" no response is checked
        try:
            row = check_row(row, kind)
        except ValueError as error:
            why = str(error).split("; name yours")[0]  # this command has no --columns
            fail(f"{file}, row {number}: {why}")
        prompt = prompt_text(row["prompt"])
        if prompt not in responses:
            responses[prompt] = text_of(row["response"])
    if not responses:
        fail(f"{file}: no rows")
    if len(responses) < len(rows):
        left_out = len(rows) - len(responses)
        note(f"{file}: left out {left_out} further responses to the same prompts")
    name = names.pop() if len(names) == 1 else ""
    return name, responses


def distinct_names(names: list[str], files: tuple[str, ...]) -> list[str]:
    """The models' names where each file has its own, else the files."""
    if all(names) and len(set(names)) == len(names):
        return names
    return list(files)


def draw(keys: list, texts: dict, args: Judge) -> list:
    """`--prompts` of the keys, in an order that depends on their texts and on `--seed`."""

    def order(key) -> float:
        return prompt_hash(texts[key], args.seed)

    drawn = sorted(keys, key=order)
    return drawn[: args.prompts] if args.prompts else drawn


def comparisons(args: Judge) -> list[tuple[int, ...]]:
    """The files that are judged together: the first with each other one, or for scores all."""
    count = len(args.responses)
    if args.mode in verdicts.PAIRS:
        return [(0, other) for other in range(1, count)]
    return [tuple(range(count))]


def swapped_first(prompt: str, args: Judge) -> bool:
    """Which order of a pair is asked first, by chance. Not by the seed of the prompts' order: what is drawn must
    not say which order is asked first."""
    return prompt_hash(prompt, args.seed + 1) >= 0.5


def say_alone(alone: list[int], args: Judge, what: str) -> None:
    """Says how many prompts of each file are not in every file."""
    for name, count in zip(args.responses, alone, strict=True):
        if count:
            left_out = ": left out" if args.mode in verdicts.PAIRS else ""
            note(f"{name}: {count} of its {what} are not in every file{left_out}")


def plain_rows(args: Judge) -> tuple[list[str], list[dict], list[int]]:
    """(names of the files, rows, how many prompts of each file are not in every file), for all modes but
    MT-Bench's. A row is what is judged: `prompt`, `responses` to it of the files `files` (their numbers), None for
    none, and `asks`, which -> question. For scores `which` is the place of the response, for pairs 0, or 1 where
    the two responses are swapped. Equal responses are not asked about: they are a tie."""
    pairwise = args.mode in verdicts.PAIRS
    template = read_template(args)
    found = [read_responses(file) for file in args.responses]
    names = distinct_names([name for name, _ in found], args.responses)
    files = [responses for _, responses in found]
    prompts = [set(file) for file in files]
    shared = set.intersection(*prompts)
    alone = [len(of_file - shared) for of_file in prompts]
    say_alone(alone, args, "prompts")
    candidates = shared if pairwise else set.union(*prompts)
    about = {}  # Arena-Hard: prompt -> (uid, category)
    if args.questions:
        about = benchmarks.read_arena_questions(args.questions)
        unknown = len(candidates - set(about))
        if unknown:
            note(f"{args.questions}: it lacks {unknown} of the prompts: left out")
        candidates = candidates & set(about)
    drawn = draw(list(candidates), {prompt: prompt for prompt in candidates}, args)
    if not drawn:
        fail("no prompt is in both files" if len(files) == 2 else "no prompt is in all files")
    rows = []
    for of_row in comparisons(args):
        for prompt in drawn:
            responses = [files[file].get(prompt) for file in of_row]
            row = {"prompt": prompt, "files": of_row, "responses": responses, "asks": {}}
            if args.mode == "arena-hard":
                by_text = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
                row["uid"], row["category"] = about.get(prompt, (by_text, "all"))
            if not pairwise:
                for which, response in enumerate(responses):
                    if response is not None:
                        row["asks"][which] = fill(template, prompt=prompt, answer=response)
            elif responses[0] != responses[1]:
                for which in (1, 0) if swapped_first(prompt, args) else (0, 1):
                    parts = {"answer_a": responses[which], "answer_b": responses[1 - which]}
                    row["asks"][which] = fill(template, prompt=prompt, **parts)
            rows.append(row)
    return names, rows, alone


def mt_bench_rows(args: Judge) -> tuple[list[str], list[dict], list[int]]:
    """The same for MT-Bench: a row for each question and turn (1 or 2), with `question_id`, `category`, `turn` and
    the name of the `judge_prompt`. In turn 2 the judge sees the whole conversation."""
    pairwise = args.mode in verdicts.PAIRS
    prompts = {
        key: ("", verdicts.mt_bench_prompt(*key)) for key in benchmarks.PROMPT_NAMES
    }  # (pairwise, turn, with a reference) -> (system prompt, prompt)
    whose = "ours-"
    if args.template:
        of_fastchat = benchmarks.read_fastchat_prompts(args.template)
        prompts = {key: of_fastchat[name] for key, name in benchmarks.PROMPT_NAMES.items()}
        whose = ""
    questions = benchmarks.read_mt_bench_questions(args.questions)
    references = {}
    if args.references:
        _, references = benchmarks.read_mt_bench_answers(args.references)
    found = [benchmarks.read_mt_bench_answers(file) for file in args.responses]
    names = distinct_names([name for name, _ in found], args.responses)
    files = [answers for _, answers in found]

    for file, answers in zip(args.responses, files, strict=True):
        for key, turns in answers.items():
            if key not in questions:
                fail(f"{file}: question {key} is not in {args.questions}")
            if len(turns) != len(questions[key]["turns"]):
                fail(
                    f"{file}: question {key} has {len(turns)} answers to {len(questions[key]['turns'])} turns"
                )
        if len(answers) < len(questions):
            note(f"{file}: {len(questions) - len(answers)} of {len(questions)} questions have no answer")
    answered = [set(answers) for answers in files]
    shared = set.intersection(*answered)
    alone = [len(of_file - shared) for of_file in answered]
    say_alone(alone, args, "questions")
    candidates = shared if pairwise else set.union(*answered)
    drawn = draw(list(candidates), {key: questions[key]["turns"][0] for key in candidates}, args)
    if not drawn:
        fail("no question is answered in all files")
    for key in drawn:
        category = questions[key]["category"]
        too_few = len(references.get(key, ())) < len(questions[key]["turns"])
        if category in benchmarks.WITH_REFERENCE and too_few:
            fail(f"question {key} ({category}) needs a reference answer to each turn: --references")

    rows = []
    for of_row, turn, key in itertools.product(comparisons(args), (1, 2), drawn):
        question = questions[key]
        if turn > len(question["turns"]):
            continue
        with_reference = question["category"] in benchmarks.WITH_REFERENCE
        kind = (pairwise, turn, with_reference)
        conversations = [files[file].get(key) for file in of_row]
        row = {
            "prompt": "\n\n".join(question["turns"][:turn]),
            "files": of_row,
            "responses": [turns and "\n\n".join(turns[:turn]) for turns in conversations],
            "asks": {},
            "question_id": key,
            "category": question["category"],
            "turn": turn,
            "judge_prompt": whose + benchmarks.PROMPT_NAMES[kind],
        }
        rows.append(row)
        parts = {"question": question["turns"][0]}
        for number, text in enumerate(question["turns"], 1):
            parts[f"question_{number}"] = text
        if with_reference:
            for number, text in enumerate(references[key], 1):
                parts[f"ref_answer_{number}"] = text
        if not pairwise:
            for which, turns in enumerate(conversations):
                if turns is not None:
                    row["asks"][which] = mt_bench_question(prompts[kind], parts, {"": turns})
        elif row["responses"][0] != row["responses"][1]:
            for which in (1, 0) if swapped_first(row["prompt"], args) else (0, 1):
                sides = {"_a": conversations[which], "_b": conversations[1 - which]}
                row["asks"][which] = mt_bench_question(prompts[kind], parts, sides)
    return names, rows, alone


def mt_bench_question(prompt: tuple[str, str], parts: dict, sides: dict[str, list[str]]) -> str | list[dict]:
    """A question to the judge, by FastChat's placeholders. `sides`: "" or "_a" and "_b" -> turns of the answer."""
    parts = dict(parts)
    for side, turns in sides.items():
        parts[f"answer{side}"] = turns[0]
        for number, text in enumerate(turns, 1):
            parts[f"answer{side}_{number}"] = text
    system, template = prompt
    text = fill(template, **parts)
    if not system:
        return text
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


# --- numbers -------------------------------------------------------------------------------------------

PAIRWISE_REPORT = """\
{judged} of {pairs} pairs: {wins} wins, {ties} ties, {losses} losses of the first file
win rate {win_rate:.3f} (95 %: {ci95[0]:.3f} to {ci95[1]:.3f}), without ties {win_rate_without_ties:.3f}
the two orders contradict: {contradictory:.3f}; A of A and B: {says_a:.3f}; \
the longer one wins: {longer_wins:.3f}"""
SCORE_REPORT = "{label}: mean {mean:.3f} (95 %: {ci95[0]:.3f} to {ci95[1]:.3f}) of {n}"


def score_summary(rows: list[dict], names: list[str]) -> dict:
    """Each file's mean score and histogram; of two files also the mean paired difference, over the prompts
    where both have a score. Says them, too."""
    summary = {"files": []}
    for file, name in enumerate(names):
        scores = [row["judged"][file] for row in rows if row["judged"][file] is not None]
        of_file = {"file": name, **average(scores)}
        of_file["histogram"] = [scores.count(score) for score in range(1, 6)]
        summary["files"].append(of_file)
        note(SCORE_REPORT.format(label=name, **of_file) + f", 1 to 5: {of_file['histogram']}")
    if len(names) == 2:
        differences = [row["judged"][0] - row["judged"][1] for row in rows if None not in row["judged"]]
        summary["difference"] = average(differences)
        note(SCORE_REPORT.format(label="first - second", **summary["difference"]))
    return summary


def report_benchmark(mode: str, found: dict[tuple[str, ...], dict]) -> None:
    """Says the numbers of benchmarks.numbers_of."""
    for (judge, model, other, category), numbers in found.items():
        label = f"{model} by {judge}"
        if other:
            label = f"{model} against {other}, by {judge}"
        if category:
            label += f", {category}"
        if mode == "arena-hard":
            low, high = numbers["ci95"]
            rate = f"win rate {numbers['win_rate']:.3f} (95 %: {low:.3f} to {high:.3f})"
            note(f"{label}: {rate} of {numbers['n']}, {numbers['unparsable']} without a verdict")
            continue
        values = {"all": numbers, "turn 1": numbers["turn_1"], "turn 2": numbers["turn_2"]} | numbers[
            "categories"
        ]
        column = "mean" if mode == "mt-bench" else "win_rate_adjusted"
        texts = [f"{name} {of[column]:.3f} ({of['n']})" for name, of in values.items()]
        note(f"{label}, {column}: {', '.join(texts)}; {numbers['unparsable']} without a verdict")


def benchmark_judgements(rows: list[dict], judge: Endpoint, names: list[str], mode: str) -> list[dict]:
    """The judge's verdicts as the benchmark's own tool writes them: FastChat's model_judgment/*_single.jsonl
    or *_pair.jsonl, arena-hard-auto's model_judgment/JUDGE/*.jsonl. What has no answer is left out there."""
    found = []
    now = time.time()
    for row in rows:
        files = [names[file] for file in row["files"]]
        asks = {which: messages_of(question) for which, question in row["asks"].items()}
        texts = {which: messages[-1]["content"] for which, messages in asks.items()}
        answers = row["answers"]
        equal = len(files) == 2 and row["responses"][0] == row["responses"][1]
        if mode == "arena-hard":
            games = []
            # the tool's first game has the baseline as A: it is our swapped one
            for which in (1, 0):
                game = None
                if equal:
                    game = {"score": "A=B", "judgment": {"answer": ""}, "prompt": []}
                elif answers[which] is not None:
                    answer = {"answer": answers[which]}
                    game = {"score": row["judged"][which], "judgment": answer, "prompt": asks[which]}
                games.append(game)
            of_row = {
                "uid": row["uid"],
                "category": row["category"],
                "judge": judge.model,
                "model": files[0],
                "baseline": files[1],
                "games": games,
            }
            if games != [None, None]:
                found.append(of_row)
            continue
        about = {
            "question_id": row["question_id"],
            "category": row["category"],
            "turn": row["turn"],
            "judge": [judge.model, row["judge_prompt"]],
            "tstamp": now,
        }
        if mode == "mt-bench":
            for which, file in enumerate(files):
                if answers[which] is not None:
                    score = row["judged"][which]
                    of_answer = {
                        **about,
                        "model": file,
                        "user_prompt": texts[which],
                        "judgment": answers[which],
                        "score": benchmarks.NO_SCORE if score is None else score,
                    }
                    found.append(of_answer)
        elif equal or None not in answers:
            first = {"A": "model_1", "B": "model_2", "neutral": "tie", None: "error"}
            swapped = {"A": "model_2", "B": "model_1", "neutral": "tie", None: "error"}
            of_pair = {
                **about,
                "model_1": files[0],
                "model_2": files[1],
                "g1_winner": "tie" if equal else first[row["judged"][0]],
                "g2_winner": "tie" if equal else swapped[row["judged"][1]],
                "g1_user_prompt": texts.get(0, ""),
                "g1_judgment": answers[0] or "",
                "g2_user_prompt": texts.get(1, ""),
                "g2_judgment": answers[1] or "",
            }
            found.append(of_pair)
    return found


def file_name(name: str) -> str:
    """A model's name as a file's."""
    return re.sub(r"[^\w.+-]+", "_", name)


def write_benchmark(folder: Path, judge: str, judgements: list[dict], mode: str) -> None:
    """Writes rows of benchmark_judgements where the benchmark's tool looks for them, under `folder`."""
    folder = folder / "model_judgment"
    if mode != "arena-hard":
        kind = "single" if mode == "mt-bench" else "pair"
        write_lines(folder / f"{file_name(judge)}_{kind}.jsonl", judgements)
        return
    of_baseline = {}
    for row in judgements:
        of_baseline.setdefault(row["baseline"], []).append(row)
    for baseline, rows in of_baseline.items():
        # A folder for each baseline: show_result takes all files of a folder for one comparison.
        of_judge = f"{judge}_against_{baseline}" if len(of_baseline) > 1 else judge
        write_lines(folder / file_name(of_judge) / f"{file_name(rows[0]['model'])}.jsonl", rows)


def write_lines(file: Path, rows: list[dict]) -> None:
    """A row a line, under a folder that is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(benchmarks.as_lines(rows), encoding="utf-8")


def judge_numbers(rows: list[dict], judge: Endpoint, names: list[str], args: Judge) -> dict:
    """The numbers of one judge by `--mode`, from rows with `judged` and `points`. Says them, and writes the
    judgements of a benchmark for its own tool."""
    summary = {}
    if args.mode == "score":
        return score_summary(rows, names)
    if args.mode in verdicts.PAIRS:
        summary["comparisons"] = []
        for of_files in comparisons(args):
            of_pair = [row for row in rows if row["files"] == of_files]
            first, second = (names[file] for file in of_files)
            numbers = pairwise_summary(of_pair)
            if len(args.responses) > 2:
                note(f"{first} against {second}:")
            note(PAIRWISE_REPORT.format(**numbers))
            summary["comparisons"].append({"first": first, "second": second, **numbers})
    if args.mode != "pairwise":
        judgements = benchmark_judgements(rows, judge, names, args.mode)
        write_benchmark(Path(args.run_dir), judge.model, judgements, args.mode)
        found = benchmarks.numbers_of(args.mode, judgements, args.seed)
        report_benchmark(args.mode, found)
        summary["benchmark"] = as_list(found)
    return summary


def as_list(found: dict[tuple[str, ...], dict]) -> list[dict]:
    """benchmarks.numbers_of for judge.json."""
    names = ("judge", "model", "against", "category")
    return [{**dict(zip(names, key, strict=True)), **numbers} for key, numbers in found.items()]


def agreements(of_judges: dict[str, list[dict]], names: list[str], args: Judge) -> list[dict]:
    """How far each two judges agree, for each comparison; for scores for each file. `of_judges`: the judge's
    name -> its rows, the same for all. Pairs agree by their outcome after both orders: two judges that always say
    A agree on nothing but ties."""
    found = []
    for one, other in itertools.combinations(of_judges, 2):
        for of_files in comparisons(args):
            if args.mode in verdicts.PAIRS:
                outcomes = []
                for judge in (one, other):
                    # equal responses were not asked about
                    asked = [row for row in of_judges[judge] if row["files"] == of_files and row["asks"]]
                    outcomes.append([outcome(row["points"]) for row in asked])
                about = {"first": names[of_files[0]], "second": names[of_files[1]]}
                found.append({"judges": [one, other], **about, **agreement(*outcomes)})
                continue
            for which in of_files:
                scores = [[row["judged"][which] for row in of_judges[judge]] for judge in (one, other)]
                found.append({"judges": [one, other], "file": names[which], **agreement(*scores)})
    for row in found:
        what = row.get("file") or f"{row['first']} against {row['second']}"
        judges = " and ".join(row["judges"])
        note(f"{judges}, {what}: agree on {row['share']:.3f} of {row['n']}, Cohen's kappa {row['kappa']:.3f}")
    return found


def win_rate_table(judges: list[dict]) -> str:
    """A markdown table: the first file's win rate against each other one, a column for each judge. `judges`: of
    judge.json."""
    first = judges[0]["comparisons"][0]["first"]
    head = [f"win rate of {first} against", *(judge["judge"] for judge in judges)]
    rows = []
    for i, comparison in enumerate(judges[0]["comparisons"]):
        cells = [comparison["second"]]
        for judge in judges:
            numbers = judge["comparisons"][i]
            low, high = numbers["ci95"]
            cells.append(f"{numbers['win_rate']:.3f} ({low:.3f} to {high:.3f}), {numbers['judged']} pairs")
        rows.append(cells)
    return markdown(head, rows)


# --- the command ---------------------------------------------------------------------------------------


def from_files(args: Judge) -> None:
    """The numbers of judgements that a benchmark's own tool wrote."""
    if args.mode not in benchmarks.COLUMNS:
        fail(f"--judgements: they are of --mode {', '.join(benchmarks.COLUMNS)}, not {args.mode}")
    if args.responses or args.judge_model:
        fail("--judgements asks nothing: leave out --responses and --judge-model")
    rows = benchmarks.read_judgements(args.mode, args.judgements)
    if args.mode == "arena-hard":
        judges = {benchmarks.judge_of(row) for row in rows}
        own = [row for row in rows if row["model"] in judges]
        if own:  # as show_result does
            note(f"left out {len(own)} judgements of judges on themselves")
        rows = [row for row in rows if row["model"] not in judges]
        if not rows:
            fail("--judgements: each is of a judge on itself")
    if args.questions and args.mode in verdicts.MT_BENCH:
        questions = benchmarks.read_mt_bench_questions(args.questions)
        for row in rows:
            if row["question_id"] not in questions:
                fail(f"{args.questions}: no question {row['question_id']}, which was judged")
            row["category"] = questions[row["question_id"]]["category"]
    found = benchmarks.numbers_of(args.mode, rows, args.seed)
    report_benchmark(args.mode, found)
    save(Path(args.run_dir), {"args": dataclasses.asdict(args), "benchmark": as_list(found)})


def save(folder: Path, summary: dict) -> None:
    """Writes judge.json; NaN, which is not JSON, as null."""

    def null(_: str) -> None:
        """NaN and Infinity, which Python writes, are not JSON."""

    strict = json.loads(json.dumps(summary), parse_constant=null)
    make_folder(folder)
    (folder / "judge.json").write_text(json.dumps(strict, indent=1) + "\n", encoding="utf-8")


def verdict_lines(rows: list[dict], judge: Endpoint, names: list[str], pairwise: bool) -> list[dict]:
    """A line for each judgement: the outputs in the order of the files, and in `order` how the judge saw them."""
    lines = []
    for row in rows:
        for which in sorted(row["asks"]):
            shown = list(range(len(row["files"]))) if pairwise else [which]
            line = {
                "judge": judge.model,
                "prompt": row["prompt"],
                "files": [names[row["files"][i]] for i in shown],
                "outputs": [row["responses"][i] for i in shown],
                "order": ("AB", "BA")[which] if pairwise else "A",
                "answer": row["answers"][which],
                "verdict": row["judged"][which],
                "failure": row["failures"][which],
            }
            for column in ("question_id", "turn", "uid", "category"):
                if column in row:
                    line[column] = row[column]
            lines.append(line)
    return lines


def with_answers(
    drawn: list[dict], keys: dict, answers: dict, failed: dict[str, str], stop: str, args: Judge
) -> list[dict]:
    """The rows of one judge: those drawn, with `answers` (raw), `judged` (verdicts or scores) and `failures`
    (reasons), one for each response, and for pairs `points`. `keys`: (row, which) -> key of the question;
    `answers` and `failed`: key -> (answer, finish reason) and key -> reason; `stop`: why no more were asked."""
    rows = []
    for i, drawn_row in enumerate(drawn):
        row = dict(drawn_row)
        row["answers"] = [None] * len(row["responses"])
        row["judged"] = [None] * len(row["responses"])
        row["failures"] = [""] * len(row["responses"])
        for which in row["asks"]:
            key = keys[i, which]
            if key in answers:
                answer = answers[key][0]
                row["answers"][which] = answer
                row["judged"][which] = parse_verdict(args.mode, answer, bool(args.template))
            else:
                row["failures"][which] = failed.get(key, f"not asked: {stop}")
        if args.mode in verdicts.PAIRS:
            row["points"] = pair_points(row)
        rows.append(row)
    return rows


def count_judgements(
    rows: list[dict], keys: dict, answers: dict, known: dict, failed: dict
) -> dict[str, int]:
    """How many judgements were wanted of a judge, and what became of them; the arguments as above, `known`: what
    the cache held before."""
    wanted = list(keys.values())
    finishes = [answers[key][1] for key in wanted if key in answers]
    valid = sum(row["judged"][which] is not None for row in rows for which in row["asks"])
    lost = sum(key in failed for key in wanted)
    return {
        "wanted": len(wanted),
        "cached": sum(key in known for key in wanted),
        "valid": valid,
        "unparsable": len(finishes) - valid,
        "failed": lost,
        "not_asked": len(wanted) - len(finishes) - lost,
        "cut": sum(finish == "length" for finish in finishes),
    }


def judge(args: Judge) -> None:
    """Asks the judges what the cache does not know yet, and writes what their answers say."""
    if args.judgements:
        from_files(args)
        return

    # --- questions
    check(args)
    judges = endpoints(args)
    sampling = sampling_settings(args)
    pairwise = args.mode in verdicts.PAIRS
    names, drawn, alone = mt_bench_rows(args) if args.mode in verdicts.MT_BENCH else plain_rows(args)
    questions = {(i, which): text for i, row in enumerate(drawn) for which, text in row["asks"].items()}
    keys_of = {}  # judge -> (row, which) -> key
    for each in judges:
        keys_of[each.model] = {
            which: question_key(each.model, question, sampling) for which, question in questions.items()
        }
    folder = Path(args.run_dir)
    file = folder / "judgements.jsonl"
    known, _ = read_answers(file)
    if args.retry_unparsable:
        for keys in keys_of.values():
            for key in set(keys.values()) & set(known):
                if parse_verdict(args.mode, known[key][0], bool(args.template)) is None:
                    del known[key]
    for each in judges:
        by_key = {keys_of[each.model][which]: question for which, question in questions.items()}
        note(estimate(each, by_key, known, sampling))
    if args.dry_run:
        return

    # --- answers
    make_folder(folder)
    lock(folder)
    cache = Cache(file)
    cache.answers = dict(known)
    failures_of = {}  # judge -> key -> reason
    stops = {}  # judge -> reason why no more were asked, or ""
    for each in judges:
        # equal questions are asked once
        by_key = {keys_of[each.model][which]: question for which, question in questions.items()}
        if "interrupted" in stops.values():
            failures_of[each.model], stops[each.model] = {}, "interrupted"
        else:
            failures_of[each.model], stops[each.model] = ask_all(each, by_key, cache, sampling, args)
    cache.file.close()
    answered = any(key in cache.answers for keys in keys_of.values() for key in keys.values())
    if questions and not answered:
        each = judges[0]
        why = stops[each.model] or next(iter(failures_of[each.model].values()))
        fail(f"{each.url}: {why}")

    # --- numbers
    arguments = dataclasses.asdict(args) | {"endpoint": [each.url for each in judges]}
    summary = {"args": arguments, "names": names, "not_in_every_file": alone, "judges": []}
    of_judges = {}  # judge -> rows
    results = []
    lines = []
    missing = {}  # judge -> how many judgements
    for each in judges:
        keys = keys_of[each.model]
        failed = failures_of[each.model]
        rows = with_answers(drawn, keys, cache.answers, failed, stops[each.model], args)
        of_judges[each.model] = rows
        counts = count_judgements(rows, keys, cache.answers, known, failed)
        missing[each.model] = counts["failed"] + counts["not_asked"]
        if len(judges) > 1:
            note(f"\njudge {each.model}:")
        summary["judges"].append(
            {
                "judge": each.model,
                "judgements": counts,
                "failures": collections.Counter(failed.values()),
                **judge_numbers(rows, each, names, args),
            }
        )
        note(
            "judgements: " + ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
        )
        lines += verdict_lines(rows, each, names, pairwise)
        for row in rows:
            left_out = ("asks", "answers", "failures")
            result = {key: value for key, value in row.items() if key not in left_out}
            result["files"] = [names[which] for which in row["files"]]
            results.append(result | {"judge": each.model})
    if len(judges) > 1:
        note("")
        summary["agreement"] = agreements(of_judges, names, args)
    if pairwise and (len(judges) > 1 or len(args.responses) > 2):
        note("\n" + win_rate_table(summary["judges"]))

    # --- save
    write_lines(folder / "results.jsonl", results)
    write_lines(folder / "verdicts.jsonl", lines)
    save(folder, summary)
    if any(missing.values()):
        parts = []
        for each in judges:
            if missing[each.model]:
                common = collections.Counter(failures_of[each.model].values()).most_common(3)
                why = stops[each.model] or ", ".join(f"{count} x {reason}" for reason, count in common)
                parts.append(f"{missing[each.model]} of {len(questions)} judgements are missing ({why})")
                if len(judges) > 1:
                    parts[-1] = f"{each.model}: {parts[-1]}"
        fail(f"{'; '.join(parts)}; the same command asks for them again")
