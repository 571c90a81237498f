"""`evaluate.py all`: answers, their values, judges and value models in one command, one table and one page.

It calls the other commands one after another; each keeps what it has, so the same command goes on where it was
stopped. docs/evaluate_all.md has the files."""

import gc
import hashlib
import json
import os
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from common import distributed
from common.cli import fail, note, parse, parse_alone
from common.data import prompt_hash
from common.lock import lock
from common.models import load_model
from common.pictures import valued_texts
from common.pretrained import resolve
from common.reference import fingerprint
from common.rollout import rollout
from common.tables import markdown
from common.tokenization import encode_prompt, load_tokenizer, tokenize
from evaluation.judge import Judge, file_name, prompt_text, read_template
from evaluation.judge import judge as ask_judge
from evaluation.page import Answer, Question, Verdict, write_page
from evaluation.responses import (
    RESPONSES_REVIEWS,
    Responses,
    check_arguments,
    json_lines,
    read_questions,
    responses,
    short_names,
    short_reward_names,
    with_interval,
)
from evaluation.text_metrics import mean
from evaluation.values import Values, accuracy_table, predict, values


@dataclass
class All:
    """Answers of several policies, judged, in one table and one page."""

    models: tuple[str, ...] = ("reviews",)
    """Policies: hub ids or folders. A judge compares each of the others with the first one."""
    names: tuple[str, ...] = ()
    """A name for each model. By default it is `x` of `runs/x/model`, else the last part."""
    dataset: str = "reviews"
    """Prompts: a hub id (`id:configuration` where it has several), a folder, or local .jsonl, .json or
    .parquet files (.gz too; several with commas between)."""
    reward: tuple[str, ...] = ()
    """Reward models (hub ids or folders) or `module:function`s to score the responses with."""
    gvm: str = ""
    """Value model from gvm_td.py: the page shows each token in the colour of its value."""
    judge_model: tuple[str, ...] = ()
    """Names of the judges at their endpoints. None: nothing is judged."""
    endpoint: tuple[str, ...] = ("http://localhost:8000/v1",)
    """Address of each judge's OpenAI-compatible server, or one for all."""
    value_models: tuple[str, ...] = ()
    """GVMs, PPO critics or reward models whose pair accuracy is measured (`evaluate.py values`)."""
    responses_flags: str = ""
    """More flags of `evaluate.py responses`, in one text: "--max-response-length 256 --temperature 0.7"."""
    judge_flags: str = ""
    """More flags of `evaluate.py judge`: "--prompts 100"."""
    values_flags: str = ""
    """More flags of `evaluate.py values`, those that read `--gvm` too: "--dataset rewardbench.jsonl"."""
    page_prompts: int = 200
    """Prompts that the page shows, drawn at random. 0: all."""
    dry_run: bool = False
    """Say what would be asked, and end."""
    run_dir: str = "runs/all"
    """Folder of all.md, all.json, all.html, and of a folder for each command."""
    seed: int = 0
    """Seed of all that is random in a run, except the split of the data (`--split-seed`)."""
    shard_size: int = 0
    """Number of ranks that a model is sharded over (HSDP: replicas of it across nodes). 0: all."""
    timeout_minutes: float = 60.0
    """Minutes after which a rank that waits for another gives up: longer than the slowest rollout, load or
    reward of one rank."""


# Flags of the other commands that are given here, so not in --responses-flags and the like.
GIVEN = (
    "--models",
    "--names",
    "--dataset",
    "--responses",
    "--judge-model",
    "--endpoint",
    "--mode",
    "--run-dir",
    "--reward",
    "--seed",
    "--shard-size",
)
PROBE = (2, 10)  # tokens of a short and of a long answer, to time one more token


# --- the commands ---------------------------------------------------------------------------------------


def flags_of(name: str, text: str) -> list[str]:
    """The words of `--responses-flags` and the like. Ends the run where one is given here already."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        fail(f"--{name}-flags {text}: {error}")
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        own = name == "values" and flag in ("--dataset", "--reward")  # other data than the answers' prompts
        if flag in GIVEN and not own:
            fail(f"--{name}-flags: {flag} is a flag of `evaluate.py all` itself, or set by it")
    return words


def responses_args(args: All) -> Responses:
    """The arguments of `evaluate.py responses`."""
    words = ["--models", *args.models, "--dataset", args.dataset, "--run-dir", f"{args.run_dir}/answers"]
    if args.names:
        words += ["--names", *args.names]
    if args.reward:
        words += ["--reward", *args.reward]
    words += ["--seed", str(args.seed), "--shard-size", str(args.shard_size)]
    return parse(Responses, RESPONSES_REVIEWS, [*words, *flags_of("responses", args.responses_flags)])


def values_args(args: All) -> Values:
    """The arguments of `evaluate.py values`, whose lengths and precision `--gvm` is read with too."""
    words = ["--models", *(args.value_models or (args.gvm,)), "--run-dir", f"{args.run_dir}/values"]
    words += ["--seed", str(args.seed), "--shard-size", str(args.shard_size)]
    return parse(Values, {}, [*words, *flags_of("values", args.values_flags)])


def judge_words(args: All, first: Path, second: Path, folder: Path) -> list[str]:
    """The flags of `evaluate.py judge` for two files of responses, by all judges."""
    words = ["--responses", str(first), str(second), "--judge-model", *args.judge_model]
    words += ["--endpoint", *args.endpoint, "--run-dir", str(folder), "--seed", str(args.seed)]
    return [*words, *flags_of("judge", args.judge_flags)]


def run_judge(words: list[str]) -> bool:
    """Whether `evaluate.py judge` had an answer to everything. What ends it is said, and does not end this
    run."""
    # rank 0 judges alone, so it is one process for `fail`, which would end the others
    ranks = os.environ.pop("WORLD_SIZE", None)
    try:
        ask_judge(parse_alone(Judge, words))
    except SystemExit as stop:
        note(str(stop))
        return False
    finally:
        if ranks is not None:
            os.environ["WORLD_SIZE"] = ranks
    return True


def judge_folder(args: All, candidate: str) -> Path:
    """Where the verdicts about a model and the first one lie."""
    return Path(args.run_dir, "judge", candidate)


# --- before anything is spent ---------------------------------------------------------------------------


def check(args: All, names: list[str]) -> None:
    """Ends the run where the flags do not fit each other."""
    if len(args.endpoint) not in (1, len(args.judge_model)) and args.judge_model:
        fail(
            f"--endpoint: {len(args.endpoint)} of them for {len(args.judge_model)} judges; give one, or one each"
        )
    if len({file_name(judge) for judge in args.judge_model}) < len(args.judge_model):
        fail(f"--judge-model: two judges of the same name among {', '.join(args.judge_model)}")
    if args.judge_model and len(names) < 2:
        fail("--judge-model: there is nothing to compare with one model alone")


def plan(args: All, asked: Responses, questions: list[dict], names: list[str]) -> None:
    """Says how many answers and verdicts are wanted, how many are there, and what they take at most: tokens,
    and the time of the answers by a short try with the first model."""
    turns = sum(len(question["turns"]) for question in questions)
    wanted = turns * asked.samples
    left = 0
    for name in names:
        there = count_lines(Path(args.run_dir, "answers", name, "responses.jsonl"))
        left += max(0, wanted - there)
    left = distributed.all_gather_object(left)[0]  # rank 0's: the others may see another disk
    tokens = left * asked.max_response_length
    note(
        f"answers: {len(names)} models, {len(questions)} prompts, {wanted} answers each, {left} to be written"
    )
    if left:
        note(f"  at most {tokens:,} tokens{time_of_answers(asked, questions, left, args.dry_run)}")
    if not args.judge_model:
        return
    settings = parse_alone(Judge, judge_words(args, Path("a"), Path("b"), Path("c")))
    there = sum(count_lines(judge_folder(args, name) / "judgements.jsonl") for name in names[1:])
    pairs = len(args.judge_model) * (len(names) - 1) * (settings.prompts or len(questions))
    left = max(0, 2 * pairs - there)
    note(f"{', '.join(args.judge_model)}: at most {left} questions (both orders), {there} answers are there")
    if left:
        # a token is about four characters
        one = len(read_template(settings)) // 4 + 2 * asked.max_response_length
        read = left * one
        written = left * settings.max_tokens
        note(f"  at most about {read:,} tokens to read and {written:,} to write, the prompts not counted")


def count_lines(file: Path) -> int:
    """Lines of a file, 0 where there is none."""
    if not file.is_file():
        return 0
    with open(file, "rb") as opened:
        return sum(1 for _ in opened)


def time_of_answers(asked: Responses, questions: list[dict], left: int, dry: bool) -> str:
    """What the plan says of time. Loads the first model for it, but not for a dry run."""
    if dry:
        return ""
    if asked.decode != "sample":
        return f"; no time is estimated for --decode {asked.decode}"
    if asked.rollout_engine != "torch":
        return f"; no time is estimated for --rollout-engine {asked.rollout_engine}"
    folder = resolve(asked.models[0])
    tokenizer = load_tokenizer(folder, asked.template_arguments)
    prompts = [encode_prompt(tokenizer, question["prompt"]) for question in questions[: asked.batch_size]]
    prompts = [ids for ids in prompts if len(ids) <= asked.max_prompt_length]
    if not prompts:
        return ""
    policy = load_model("policy", folder, tokenizer, asked, trained=False)
    seconds = []
    for limit in (PROBE[0], *PROBE):  # the first call compares the sampler with the policy: not timed
        start = time.perf_counter()
        rollout(policy, tokenizer, prompts, limit, asked.temperature, (asked.seed, 0), compare=False)
        seconds.append(time.perf_counter() - start)
    del policy
    gc.collect()  # sharded modules are in reference cycles
    short, long = seconds[1:]
    a_token = max(0.0, long - short) / (PROBE[1] - PROBE[0])
    a_batch = short + a_token * (asked.max_response_length - PROBE[0])
    whole = a_batch * -(-left // asked.batch_size)
    return f", at most about {duration(whole)} at the speed of {asked.models[0]}"


def duration(seconds: float) -> str:
    """In words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def try_judges(args: All) -> None:
    """Asks the judges about one pair, before hours are spent on answers that nobody can judge. Ends the run
    where one does not answer."""
    folder = Path(args.run_dir, "judge", "try")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = [folder / "a.jsonl", folder / "b.jsonl"]
    for file, fruit in zip(files, ("An apple.", "No."), strict=True):
        file.write_text(json_lines([{"prompt": "Name a fruit.", "response": fruit}]))
    note(f"a try of {', '.join(args.judge_model)}:")
    start = time.perf_counter()
    if not run_judge(judge_words(args, *files, folder)):
        fail("--judge-model: no answer to a try; nothing was spent on answers yet")
    a_question = (time.perf_counter() - start) / (2 * len(args.judge_model))
    note(f"{a_question:.1f} s a question")


# --- values of the answers ------------------------------------------------------------------------------


def value_answers(args: All, names: list[str]) -> dict[str, list[list[tuple[str, float]] | None]]:
    """model -> of each of its answers the (text, value) of every token by `--gvm`; None for an answer to a
    prompt that is too long for it. Kept in token_values.json beside the answers."""
    settings = values_args(args)
    folder = resolve(args.gvm, "value")
    tokenizer = load_tokenizer(folder, settings.template_arguments)
    gvm = None
    found = {}
    for name in names:
        records = read_answers(args, name)
        rows = []
        for number, record in enumerate(records):
            if record["response"].strip():  # an empty answer has no token to read
                rows.append({**record, "row": number})
        texts = [[row["prompt"], row["response"]] for row in rows]
        made_with = [fingerprint(folder), settings.max_prompt_length, settings.max_response_length, texts]
        key = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()
        file = Path(args.run_dir, "answers", name, "token_values.json")
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if kept.get("key") != key:
            if gvm is None:
                gvm = load_model("value", folder, tokenizer, settings, trained=False)
            kept = {"key": key, "tokens": tokens_of(gvm, tokenizer, rows, len(records), settings)}
            if distributed.rank() == 0:
                file.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
        found[name] = kept["tokens"]
    return found


def tokens_of(gvm, tokenizer, rows: list[dict], count: int, settings: Values) -> list:
    """The (text, value) of every token of the rows' answers, at the places that `row` names, of `count`."""
    tokens = [None] * count
    if not rows:
        return tokens
    lengths = (settings.max_prompt_length, settings.max_response_length)
    rows = tokenize(rows, tokenizer, ("response",), *lengths, "the answers", True)
    token_values = predict(gvm, "value", rows, tokenizer, settings)
    for row, of_row in zip(rows, token_values, strict=True):
        tokens[row["row"]] = valued_texts(tokenizer, row["response_ids"], of_row)
    return tokens


def read_answers(args: All, name: str) -> list[dict]:
    """The records of a model's answers."""
    return read_lines(Path(args.run_dir, "answers", name, "responses.jsonl"))


# --- table and page -------------------------------------------------------------------------------------


def answers_table(
    args: All, names: list[str], numbers: dict, summaries: dict
) -> tuple[list[str], list[list[str]]]:
    """(head, rows), a row for each model: the numbers of its answers, and its win rate over the first one by each judge."""
    columns = list(next(iter(numbers.values())))
    head = ["model", "n", *columns]
    head += [f"win rate over {names[0]}, {judge}" for judge in args.judge_model]
    rows = []
    for name in names:
        of_model = numbers[name]
        row = [name, str(of_model["length"]["n"])]
        for column in columns:
            row.append(with_interval(of_model[column]))
        for judge in args.judge_model:
            row.append(win_rate_cell(summaries.get((judge, name))))
        rows.append(row)
    return head, rows


def win_rate_cell(summary: dict | None) -> str:
    """A win rate with its interval and how many pairs it is of."""
    if summary is None or summary["win_rate"] is None:
        return "-"
    low, high = summary["ci95"]
    return f"{summary['win_rate']:.3f} ({low:.3f} to {high:.3f}), {summary['judged']} of {summary['pairs']}"


def page_questions(args: All, names: list[str], tokens: dict, scores: dict) -> tuple[list[Question], int]:
    """(what the page shows, how many prompts it leaves out). `scores`: model -> of each answer its rewards."""
    records = {name: read_answers(args, name) for name in names}
    verdicts = read_verdicts(args, names)
    asked = records[names[0]]
    drawn = list(range(len(asked)))
    if args.page_prompts:
        drawn.sort(
            key=lambda i: prompt_hash(str(asked[i]["row"]), args.seed)
        )  # all samples and turns of a row
        rows = list(dict.fromkeys(asked[i]["row"] for i in drawn))[: args.page_prompts]
        drawn = sorted(i for i in drawn if asked[i]["row"] in set(rows))
    questions = []
    for i in drawn:
        answers = []
        for name in names:
            record = records[name][i]
            numbers = {"length": record["length"], **(scores[name][i] if name in scores else {})}
            of_answer = tokens[name][i] if name in tokens else None
            if of_answer:
                numbers["last value"] = of_answer[-1][1]
            answers.append(Answer(name, record["response"], numbers, of_answer))
        of_question = []
        for candidate in names[1:]:
            texts = (records[candidate][i]["response"], records[names[0]][i]["response"])
            # each model's own answers stand in the prompt of a second turn: the judge saw the candidate's
            prompt = prompt_text(records[candidate][i]["prompt"])
            for judge in args.judge_model:
                verdict = verdicts.get((judge, candidate, prompt, *texts))
                if verdict:
                    of_question.append(verdict)
        questions.append(Question(prompt_text(asked[i]["prompt"]), answers, of_question))
    shown = len({asked[i]["row"] for i in drawn})
    return questions, len({record["row"] for record in asked}) - shown


def read_verdicts(args: All, names: list[str]) -> dict[tuple, Verdict]:
    """(judge, model, prompt, its answer, the first model's answer) -> what the judge said."""
    found = {}
    for candidate in names[1:]:
        folder = judge_folder(args, candidate)
        if not (folder / "results.jsonl").is_file():
            continue
        said = {}  # the same key without the model -> (heading, text) of each order
        for row in read_lines(folder / "verdicts.jsonl"):
            if row["answer"] is not None:
                as_a = candidate if row["order"] == "AB" else names[0]
                heading = f"what it said, {as_a} as A"
                said.setdefault((row["judge"], row["prompt"], *row["outputs"]), []).append(
                    (heading, row["answer"])
                )
        for row in read_lines(folder / "results.jsonl"):
            key = (row["prompt"], *row["responses"])
            contradictory = row["judged"] in (["A", "A"], ["B", "B"])
            words = said.get((row["judge"], *key), [])
            verdict = Verdict(row["judge"], candidate, names[0], row["points"], contradictory, words)
            found[row["judge"], candidate, *key] = verdict
    return found


def read_lines(file: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def read_scores(args: All, names: list[str]) -> dict[str, list[dict[str, float]]]:
    """model -> the rewards of each answer, by name."""
    found = {}
    for name in names:
        rows = read_lines(Path(args.run_dir, "answers", name, "scored.jsonl"))
        found[name] = [row["rewards"] for row in rows]
    return found


# --- the command ----------------------------------------------------------------------------------------


def evaluate_all(args: All) -> None:
    """What is configured, one after another; then the table and the page."""
    # --- setup and plan
    asked = responses_args(args)
    names = list(args.names or short_names(args.models))
    check(args, names)
    if args.value_models or args.gvm:
        values_args(args)  # a wrong flag ends the run now
    check_arguments(asked, names, short_reward_names(asked.reward))
    questions = read_questions(asked)
    first_rank = distributed.rank() == 0
    plan(args, asked, questions, names)
    if args.dry_run:
        return
    if first_rank:
        lock(Path(args.run_dir))
    if first_rank and args.judge_model:
        try_judges(args)

    # --- what needs the models
    responses(asked)
    distributed.all_gather_object(None)  # rank 0 has written the answers
    tokens = value_answers(args, names) if args.gvm else {}
    if args.value_models:
        values(values_args(args))
    if not first_rank:
        return

    # --- judges
    answers = Path(args.run_dir, "answers")
    missing = []
    summaries = {}  # (judge, model) -> what evaluate.py judge found
    agreements = {}
    for candidate in names[1:] if args.judge_model else ():
        files = [answers / name / "responses.jsonl" for name in (candidate, names[0])]
        folder = judge_folder(args, candidate)
        note(f"{candidate} against {names[0]}:")
        if not run_judge(judge_words(args, *files, folder)):
            missing.append(candidate)
        if (folder / "judge.json").is_file():
            found = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
            for of_judge in found["judges"]:
                summaries[of_judge["judge"], candidate] = of_judge["comparisons"][0]
            agreements[candidate] = found.get("agreement", [])

    # --- save
    numbers = json.loads((answers / "responses.json").read_text(encoding="utf-8"))["models"]
    for name, of_model in tokens.items():
        last = [answer[-1][1] for answer in of_model if answer]
        if last:
            numbers[name]["last value"] = mean(last, f"{args.gvm}, of {len(last)} answers")
    head, rows = answers_table(args, names, numbers, summaries)
    tables = [("answers", [head, *rows])]
    text = markdown(head, rows) + "\n"
    result = {"args": vars(args), "answers": numbers, "judge": {}, "agreement": agreements}
    for (judge, candidate), summary in summaries.items():
        result["judge"].setdefault(judge, {})[candidate] = summary
    if args.value_models:
        found = json.loads(Path(args.run_dir, "values", "values.json").read_text(encoding="utf-8"))
        result["values"] = found["accuracy"]
        head, rows = accuracy_table(found["accuracy"])
        text += "\n" + markdown(head, rows) + "\n"
        tables.append(("pair accuracy of value models", [head, *rows]))
    Path(args.run_dir, "all.md").write_text(text, encoding="utf-8")
    Path(args.run_dir, "all.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    scores = read_scores(args, names) if asked.reward else {}
    shown, left_out = page_questions(args, names, tokens, scores)
    page = Path(args.run_dir, "all.html")
    write_page(page, f"{', '.join(names)} on {args.dataset}", shown, tables, left_out)
    note(f"{text}\nthe answers side by side: {page}")
    if missing:
        fail(f"judgements are missing ({', '.join(missing)}); the same command asks for them again")
