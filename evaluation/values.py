"""`evaluate.py values`: do value models prefer the better answer? Pair accuracies, pictures of token values.

The numbers are those of 2502.16944 appendix E, and RewardBench's; docs/evaluate.md explains them."""

import gc
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import AutoConfig

from common import distributed, positions
from common.batches import run_micro_batches
from common.cli import fail, make_folder, note
from common.context import add_context
from common.data import hold_out, read_rows
from common.measures import (
    MAX_PAIRS,
    STATISTICS,
    better_policy_wins,
    longer_wins,
    make_pairs,
    pair_accuracy,
    response_statistics,
    sample_pairs,
    whole_pairs,
)
from common.models import load_model
from common.pictures import draw_values, valued_texts
from common.positions import longest_of
from common.pretrained import load_pretrained, resolve
from common.rewards import Reward
from common.tables import markdown
from common.templates import text_of
from common.tokenization import load_tokenizer, tokenize
from common.value_heads import response_values, sequence_scores
from evaluation import reward_bench


@dataclass
class Values:
    """Pair accuracy of value and reward models, pictures of token values."""

    models: tuple[str, ...] = ("reviews",)
    """GVMs, PPO critics or reward models: hub ids or folders. Each reads the text by its own tokenizer."""
    like: str = ""
    """Run of gvm_td.py or reward.py whose held-out pairs are judged, read as that run read them. By
    default it is the first model's run."""
    dataset: str = ""
    """Pairs or scored responses: a hub id (`id:configuration` where it has several), a folder, or local .jsonl, .json or
    .parquet files (.gz too; several with commas between);
    RewardBench's files are read as they are, those of version 2 with `--source best-of`."""
    source: Literal["preference", "scores", "best-of"] = "preference"
    """What the data set holds. preference: prompt, chosen, rejected; scores: prompt, response, reward (all
    pairs of a prompt at least `--gap` apart); best-of: prompt, lists of answers in chosen and rejected."""
    split: str = "train"
    """Split of a hub data set; of a local file, the value that its column `split` must have."""
    reward: str = ""
    """Reward model or `module:function` whose scores replace the data set's own, with `--source scores`."""
    gap: float = 0.0
    """Smallest difference of scores that makes a pair."""
    max_pairs: int = 0
    """Size of a random sample of the pairs, with `--source best-of` of the prompts. 0: all."""
    fraction: float = 1.0
    """Share of the prompts to judge: those that a run with this `--eval-fraction` holds out."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names and yours, in pairs: `--columns prompt question response answer`."""
    template_arguments: dict[str, str] = field(default_factory=dict)
    """Arguments for the chat template and their values, in pairs: `--template-arguments enable_thinking
    false`."""
    part: Literal["all", "sft", "value", "rl"] = "all"
    """Share of the prompts to use: sft is 30 %, value 50 %, rl 20 %, disjoint by prompt (2502.16944)."""
    split_seed: int = 0
    """Seed of the split into parts and held-out prompts. It must be the same in all scripts of an
    experiment."""
    skip_bad_rows: bool = False
    """Drop and count unusable rows (an empty response is one) instead of stopping at the first."""
    max_characters: int = 0
    """Drop and count pairs, or prompts, with a response longer than this many characters. 0: no limit."""
    max_prompt_length: int = 1024
    """Longest prompt, in tokens; longer ones are dropped and counted."""
    max_response_length: int = 1024
    """Longest response, in tokens; a longer one is cut there."""
    context_pairs: int = -1
    """Question-answer pairs by the same policy before each prompt. -1: as each model was trained."""
    lam: float = 0.95
    """Lambda of the backup of a response's token values to one score."""
    micro_batch_size: int = 8
    """Responses per forward pass on one rank."""
    text: tuple[str, ...] = ()
    """A prompt and responses to it, to be drawn token by token."""
    draw: int = 2
    """Number of pairs that are drawn token by token; of a prompt with many answers the first right and wrong one."""
    run_dir: str = "runs/evaluate"
    """Folder of values.json, values.md, values.jsonl and the pictures."""
    seed: int = 0
    """Seed of all that is random in a run, except the split of the data (`--split-seed`)."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """Type that computes; auto is bf16 on a GPU and float32 on a CPU."""
    shard_size: int = 0
    """Number of ranks that a model is sharded over (HSDP: replicas of it across nodes). 0: all."""
    timeout_minutes: float = 60.0
    """Minutes after which a rank that waits for another gives up: longer than the slowest rollout, load or
    reward of one rank."""


# The columns of the table: statistics of the token values, their backup, and the one score that a reward
# model or a baseline gives a response.
COLUMNS = (*STATISTICS, "backup", "score")

# The embedded model lies in no run. This is what args.json would hold of the run of gvm_td.py that made it.
REVIEWS_RUN = dict(
    dataset="reviews",
    part="value",
    eval_dataset="",
    eval_source="preference",
    eval_gap=0.0,
    eval_fraction=0.2,
    max_prompt_length=16,
    max_response_length=32,
    micro_batch_size=64,
)

# Flags that are taken over from the run whose pairs are judged.
FLAGS_OF_THE_RUN = (
    "dataset",
    "columns",
    "part",
    "split",
    "split_seed",
    "skip_bad_rows",
    "max_characters",
    "max_prompt_length",
    "max_response_length",
    "reward",
    "seed",
)


# --- numbers -------------------------------------------------------------------------------------------


def backup(values: list[float], gamma: float, lam: float) -> float:
    """One response's token values Q_1 .. Q_T to one score, by the Bellman backup that a GVM is trained with.
    It is the lambda-return that V(s_1) regresses on (gvm_td.py), with Q_T where the score S stood:
    G_T = Q_T, G_t = gamma ((1 - lam) Q_{t+1} + lam G_{t+1}), and the result is (1 - lam) Q_1 + lam G_1.
    lam 0 gives Q_1; lam 1 and gamma 1 give Q_T."""
    target = values[-1]
    for following in reversed(values[1:]):
        target = gamma * ((1 - lam) * following + lam * target)
    return (1 - lam) * values[0] + lam * target


def accuracies(pairs: list[tuple[list[float], list[float]]], gamma: float, lam: float) -> dict[str, float]:
    """Share of pairs whose chosen response strictly wins, by every statistic of its token values and by the
    backup. `pairs`: of each pair the token values of the chosen and of the rejected response, any number."""
    chosen = [chosen_values for chosen_values, _ in pairs]
    rejected = [rejected_values for _, rejected_values in pairs]
    shares = pair_accuracy(chosen, rejected)
    wins = [backup(c, gamma, lam) > backup(r, gamma, lam) for c, r in pairs]
    shares["backup"] = float(np.mean(wins))
    return shares


def score_accuracy(pairs: list[tuple[list[float], list[float]]]) -> dict[str, float]:
    """The same for a reward model, which gives each response a list of one number, its score."""
    wins = [chosen[0] > rejected[0] for chosen, rejected in pairs]
    return {"score": sum(wins) / len(wins)}


def length_baseline(pairs: list[tuple[dict, dict]]) -> dict[str, float]:
    """The table's column of a baseline, for pairs of rows."""
    return {"score": longer_wins(pairs)}


def policy_baseline(pairs: list[tuple[dict, dict]], averages: dict[str, float]) -> dict[str, float]:
    """As `length_baseline`, of the policies' average rewards in training."""
    return {"score": better_policy_wins(pairs, averages)}


def response_scores(token_values: list[float], kind: str, gamma: float, lam: float) -> dict[str, float]:
    """The columns of one response: a score for each statistic of its token values and for their backup; of a
    reward model its score, which `token_values` then holds alone."""
    if kind == "reward":
        return {"score": token_values[0]}
    return response_statistics(token_values) | {"backup": backup(token_values, gamma, lam)}


def length_scores(rows: list[tuple[dict, ...]]) -> list[list[dict[str, float]]]:
    """The baseline's columns of each answer: its number of characters as its score."""
    return [[{"score": float(len(text_of(row["response"])))} for row in answers] for answers in rows]


def by_subset(measure, pairs: list, subsets: list[str | None], *settings) -> dict[str, dict[str, float]]:
    """`measure(pairs, *settings)` of all pairs (row `all`), of each named subset, and the plain mean over
    subsets (row `average`), in which a small subset counts as much as a large one. `subsets`: each pair's,
    None for none."""
    table = {"all": measure(pairs, *settings) | {"pairs": len(pairs)}}
    names = sorted({name for name in subsets if name is not None})
    for name in names:
        of_subset = [pair for pair, subset in zip(pairs, subsets, strict=True) if subset == name]
        table[name] = measure(of_subset, *settings) | {"pairs": len(of_subset)}
    if names:
        average = {}
        for key in table["all"]:
            average[key] = float(np.mean([table[name][key] for name in names]))
        # The number of pairs is no share: it is summed.
        average["pairs"] = sum(table[name]["pairs"] for name in names)
        table["average"] = average
    return table


def accuracy_table(tables: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a row for each model or baseline, and for each of its subsets. What a row counts, `pairs` or
    `prompts`, is the same in all."""
    first = next(iter(next(iter(tables.values())).values()))
    unit = "prompts" if "prompts" in first else "pairs"
    head = [f"share of {unit}", unit, *COLUMNS]
    rows = []
    for name, table in tables.items():
        for subset, shares in table.items():
            label = name if subset == "all" else f"{name}: {subset}"
            cells = [label, str(shares[unit])]
            for column in COLUMNS:
                cells.append(f"{shares[column]:.3f}" if column in shares else "")
            rows.append(cells)
    return head, rows


# --- what is judged ------------------------------------------------------------------------------------


def read_json(file: Path) -> dict:
    """The file's object; an empty one where there is no file."""
    return json.loads(file.read_text()) if file.is_file() else {}


def as_the_run(args: Values) -> tuple[Values, dict[str, float]]:
    """(`args` that read the held-out pairs of a run as that run read them, the average training reward of
    each policy in the run). The run is `--like`, or without --dataset the run that the first model lies in.
    With --dataset `args` come back as they are. Ends where `--like` is no run."""
    folder = Path(args.like or Path(args.models[0]).parent)
    if args.models[0] == "reviews" and not args.like:
        run = REVIEWS_RUN
    else:
        run = read_json(folder / "args.json")
    if args.like and args.dataset:
        fail("--like and --dataset exclude each other")
    if args.like and "eval_dataset" not in run:
        fail(f"--like {folder}: no run of gvm_td.py or reward.py is there")
    averages = read_json(folder / "accuracy.json").get("policy_averages", {})
    if args.dataset or "eval_fraction" not in run:
        return args, averages

    found = {flag: run[flag] for flag in FLAGS_OF_THE_RUN if flag in run}
    if run["eval_dataset"]:
        found["dataset"] = run["eval_dataset"]
        found["split"] = run["eval_split"]
        found["part"] = "all"
    else:
        found["fraction"] = run["eval_fraction"]
    scale = 2  # reward.py counts pairs in its micro-batches, this command counts responses
    if "eval_gap" in run:  # a run of gvm_td.py
        scale = 1
        found["source"] = run["eval_source"] or run["source"]
        found["gap"] = run["eval_gap"]
        found["max_pairs"] = MAX_PAIRS
    if args.micro_batch_size == Values.micro_batch_size:  # none is given
        # The run's own micro-batches: the same sums in the same order, so the same digits.
        found["micro_batch_size"] = run["micro_batch_size"] * scale
    return replace(args, **found), averages


def drop_long(rows: list[dict], args: Values) -> list[dict]:
    """The rows whose responses have at most `--max-characters` characters; the others are counted. With
    `--source best-of` all answers of a prompt go with a long one."""
    columns = ("chosen", "rejected") if args.source == "preference" else ("response",)
    long_rows = [
        i for i, row in enumerate(rows) if any(len(text_of(row[c])) > args.max_characters for c in columns)
    ]
    if args.source == "best-of":
        long_groups = {rows[i]["group"] for i in long_rows}
        long_rows = [i for i, row in enumerate(rows) if row["group"] in long_groups]
    dropped = set(long_rows)
    note(f"{args.dataset}: dropped {len(dropped)} of {len(rows)} rows: response over --max-characters")
    return [row for i, row in enumerate(rows) if i not in dropped]


def responses_of_pairs(rows: list[dict]) -> list[dict]:
    """Preference rows to two rows each, one per response, the chosen one first."""
    responses = []
    for i, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            policy = row.get(f"{side}_policy") or row.get(f"{side}_model")  # RewardBench's name for it
            responses.append({**row, "response": row[side], "policy": policy, "pair": i})
    return responses


def with_groups(rows: list[dict], args: Values) -> list[dict]:
    """Best-of rows with `group`, the number of their prompt. Where a prompt fits no rule of RewardBench 2 the run
    ends, or drops and counts it with `--skip-bad-rows`."""
    groups = []
    for row in rows:
        if row["answer"] == 0:
            groups.append([])
        groups[-1].append({**row, "group": len(groups) - 1})
    kept = []
    bad = 0
    seen = set()
    for group in groups:
        try:
            reward_bench.check_prompt(group[0], seen)
            kept += group
        except ValueError as error:
            if not args.skip_bad_rows:
                name = f"{args.dataset}, row {group[0]['row']}"
                fail(f"{name}: {error} (or drop such rows with --skip-bad-rows)")
            bad += 1
    if bad:
        note(f"{args.dataset}: dropped {bad} prompts of {len(groups)} that RewardBench 2's rules do not fit")
    return kept


def whole_groups(rows: list[dict]) -> list[tuple[dict, ...]]:
    """The answers of each prompt, the right ones first. A prompt of which an answer was dropped, as one that cannot
    be written is, is left out and counted."""
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    whole = [tuple(group) for group in groups.values() if len(group) == group[0]["answers"]]
    if len(whole) < len(groups):
        note(f"dropped {len(groups) - len(whole)} prompts of {len(groups)} of which an answer was dropped")
    return whole


def load_rows(args: Values) -> list[dict]:
    """The responses to judge, one per row: held out, with a `reward` unless `--reward` is to give it.
    Ends the run where none is left."""
    if args.source == "best-of":
        kind = "best_of"
    elif args.source == "preference":
        kind = "preference"
    elif args.reward:
        kind = "responses"
    else:
        kind = "scored"
    rows = read_rows(
        args.dataset,
        kind,
        split=args.split,
        columns=args.columns,
        part=args.part,
        split_seed=args.split_seed,
        skip_bad_rows=args.skip_bad_rows,
    )
    if args.source == "best-of":
        rows = with_groups(rows, args)
    if args.max_characters:
        rows = drop_long(rows, args)
    _, held_out = hold_out(rows, args.fraction, args.split_seed)
    if not held_out:
        fail(f"{args.dataset}: no row is left to judge")
    if args.source == "preference":
        return responses_of_pairs(held_out)
    return held_out


def with_tokens(rows: list[dict], tokenizer, args: Values, kind: str = "value") -> list[dict]:
    """Adds `prompt_ids` and `response_ids`; for a reward model with what its template writes after the end.
    Rows with long prompts are dropped, long responses are cut."""
    return tokenize(
        rows,
        tokenizer,
        ("response",),
        args.max_prompt_length,
        args.max_response_length,
        args.dataset or "--text",
        args.skip_bad_rows,
        whole=kind == "reward",
    )


def with_rewards(rows: list[dict], tokenizer, args: Values) -> list[dict]:
    """The rows with the scores of `--reward` in place of the data set's own."""
    rows = with_tokens(rows, tokenizer, args)
    scorer = Reward(args.reward, tokenizer, args, rows)
    sequences = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    rewards = scorer(rows, sequences, [row["response"] for row in rows])  # [N]
    scored = [{**row, "reward": reward} for row, reward in zip(rows, rewards.tolist(), strict=True)]
    del scorer
    gc.collect()  # sharded modules are in reference cycles
    return scored


def choose_pairs(rows: list[dict], args: Values) -> list[tuple[dict, ...]]:
    """The (chosen, rejected) pairs of rows to judge, or with `--source best-of` all answers of each prompt, the right
    ones first; at most `--max-pairs`. Ends the run without one.

    Preference data are pairs already, whatever `--gap` says.
    """
    if args.source == "best-of":
        pairs = whole_groups(rows)
        if not pairs:
            fail(f"{args.dataset}: no prompt is left with all of its answers")
    elif args.source == "preference":
        pairs = whole_pairs(rows)
    else:
        pairs = make_pairs(rows, args.gap)
    if not pairs:
        fail(f"{args.dataset}: no two responses to a prompt with --gap between them")
    if args.max_pairs:
        pairs = sample_pairs(pairs, args.max_pairs)
    if args.source == "best-of":
        prompts = [answers[0] for answers in pairs]
        ties_alone = all(reward_bench.is_ties(row.get("subset")) for row in prompts)
        if ties_alone and not reward_bench.has_ties_score(prompts):
            fail(f"{args.dataset}: {reward_bench.NO_TIES_SCORE}")
    return pairs


# --- models --------------------------------------------------------------------------------------------


def predict(model, kind: str, rows: list[dict], tokenizer, args: Values) -> list[list[float]]:
    """The token values of each response; of a model of kind "reward" its score alone, as a list of one."""
    sequences = [(row["prompt_ids"], row["response_ids"]) for row in rows]
    positions.check(model, model.config.model_type, longest_of(sequences))
    longest = max(len(response_ids) for _, response_ids in sequences)
    dtype = torch.float64 if args.precision == "fp64" else torch.float32

    # a reward model is read before the padding that its own config names
    pad = model.config.get_text_config().pad_token_id if kind == "reward" else tokenizer.pad_token_id

    def forward(mb: dict) -> torch.Tensor:
        if kind == "reward":
            return sequence_scores(model, **mb)  # [b, 1]
        return response_values(model, **mb)  # [b, T + 1]: V(s_1), then Q(s_t, a_t) of each response token

    outputs = run_micro_batches(
        forward,
        sequences,
        args.micro_batch_size,
        pad,
        longest + 1,
        dtype,
    )
    outputs = outputs.cpu()  # [N, T + 1]
    if kind == "reward":
        return [row[:1].tolist() for row in outputs]
    token_values = []
    for row, (_, response_ids) in zip(outputs, sequences, strict=True):
        token_values.append(row[1 : len(response_ids) + 1].tolist())
    return token_values


def predict_pairs(
    model, kind: str, pairs: list[tuple[dict, ...]], config, tokenizer, args: Values
) -> list[tuple[list[float], ...]]:
    """The token values of each response of each pair, or of each prompt's answers. The prompts begin with the context
    that the model was trained with, or with `--context-pairs` of it."""
    rows = [row for pair in pairs for row in pair]  # chosen, rejected, chosen, rejected, ...
    context_pairs = args.context_pairs
    if context_pairs < 0:
        context_pairs = getattr(config, "context_pairs", 0)
    context_length = getattr(config, "context_length", 256)
    rows = add_context(rows, context_pairs, rows, tokenizer, context_length, args.seed)
    predicted = iter(predict(model, kind, rows, tokenizer, args))
    return [tuple(next(predicted) for _ in pair) for pair in pairs]


def table_of(
    kind: str, pairs: list[tuple[dict, ...]], pair_values: list[tuple[list[float], ...]], config, args: Values
) -> dict[str, dict]:
    """A model's rows of the table, with RewardBench's where the subsets are its. `config`: the model's."""
    gamma = getattr(config, "gamma", 1.0)
    subsets = [pair[0].get("subset") for pair in pairs]
    if args.source == "best-of":
        scores = []
        for answers in pair_values:
            scores.append([response_scores(token_values, kind, gamma, args.lam) for token_values in answers])
        return reward_bench.best_of_table(pairs, scores)
    if kind == "reward":
        table = by_subset(score_accuracy, pair_values, subsets)
    else:
        table = by_subset(accuracies, pair_values, subsets, gamma, args.lam)
    return table | reward_bench.section_rows(table)


# --- what is shown -------------------------------------------------------------------------------------


def baseline_tables(
    pairs: list[tuple[dict, ...]], averages: dict[str, float], args: Values
) -> dict[str, dict]:
    """The baselines' tables by name. The one by policy is left out where no policy's average is known, and of prompts
    with several answers."""
    longer = "baseline: the longer one"
    if args.source == "best-of":
        return {longer: reward_bench.best_of_table(pairs, length_scores(pairs))}
    subsets = [chosen.get("subset") for chosen, _ in pairs]
    table = by_subset(length_baseline, pairs, subsets)
    tables = {longer: table | reward_bench.section_rows(table)}
    policies = {row.get("policy") for pair in pairs for row in pair}
    if policies & set(averages):
        tables["baseline: the better policy"] = by_subset(policy_baseline, pairs, subsets, averages)
    return tables


def say_what_is_missing(
    label: str, table: dict[str, dict], pairs: list[tuple[dict, ...]], args: Values
) -> None:
    """Notes on what the model's table lacks of RewardBench."""
    if args.source == "best-of":
        lines = reward_bench.incomplete_ties([answers[0] for answers in pairs])
    else:
        lines = reward_bench.incomplete_sections(table)
    for line in lines:
        note(f"{label}: RewardBench: {line}")


def pair_records(
    model: str, pairs: list[tuple[dict, ...]], pair_values: list[tuple[list[float], ...]], args: Values
) -> list[dict]:
    """The rows of values.jsonl, one per pair. With `--source best-of` one per prompt, and each side is a list."""
    records = []
    for pair, of_pair in zip(pairs, pair_values, strict=True):
        record = {"model": model, "subset": pair[0].get("subset"), "prompt": pair[0]["prompt"]}
        responses = [row["response"] for row in pair]
        if args.source == "best-of":
            right = pair[0]["right"]
            record["id"] = pair[0].get("id")
            record |= {"chosen": responses[:right], "rejected": responses[right:]}
            record |= {"chosen_values": of_pair[:right], "rejected_values": of_pair[right:]}
        else:
            record |= {"chosen": responses[0], "rejected": responses[1]}
            record |= {"chosen_values": of_pair[0], "rejected_values": of_pair[1]}
        records.append(record)
    return records


def picture(
    kind: str, row: dict, token_values: list[float], tokenizer
) -> tuple[str, list[tuple[str, float]]]:
    """(title, texts of tokens with their values) of a response, as `draw_values` takes them. `kind` begins the
    title."""
    prompt = json.dumps(row["prompt"], ensure_ascii=False)[:80]
    return kind + prompt, valued_texts(tokenizer, row["response_ids"], token_values)


def save(tables: dict[str, dict], records: list[dict], args: Values) -> None:
    """Writes the table (values.md, values.json) and each pair's values (values.jsonl); shows the table."""
    folder = Path(args.run_dir)
    text = markdown(*accuracy_table(tables))
    (folder / "values.md").write_text(text + "\n")
    accuracy = {"settings": vars(args), "accuracy": tables}
    (folder / "values.json").write_text(json.dumps(accuracy, indent=1))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in records]
    (folder / "values.jsonl").write_text("".join(lines), encoding="utf-8")
    ties = "ties are not wins"
    if args.source == "best-of":
        ties = "a right answer that shares the highest score with k - 1 others counts 1 / k"
    note(f"{text}\n{ties}; the standard error of a share of n pairs or prompts is at most 0.5 / sqrt(n)")


# --- the command ---------------------------------------------------------------------------------------


def values(args: Values) -> None:
    """Each model in turn gives the token values of all pairs' responses; then the tables are written."""
    # --- setup
    if not args.models:
        fail("--models: give at least one")
    if len(args.text) == 1:
        fail("--text: give a prompt and at least one response to it")
    if args.reward and args.dataset and args.source != "scores":
        fail("--reward scores the responses of --source scores alone")
    folders = [resolve(name, "value") for name in args.models]
    args, averages = as_the_run(args)
    if not args.dataset and not args.text:
        no_run = f"{args.models[0]} lies in no run of gvm_td.py or reward.py"
        fail(f"{no_run}; say with --dataset or --like which pairs to judge")
    first_rank = distributed.rank() == 0

    # --- data
    rows = load_rows(args) if args.dataset else []
    if rows and args.source == "scores" and args.reward:
        rows = with_rewards(rows, load_tokenizer(folders[0], args.template_arguments), args)
    texts = [{"prompt": args.text[0], "response": response} for response in args.text[1:]]

    make_folder(args.run_dir)
    tables = {}  # of each model: subset -> statistic -> share of pairs
    baselines = {}  # the same of each baseline
    records = []  # of each model and pair
    drawings = 0
    for label, folder in zip(args.models, folders, strict=True):
        # --- models
        tokenizer = load_tokenizer(folder, args.template_arguments)
        config = load_pretrained("configuration", AutoConfig, folder)
        kind = "reward" if "SequenceClassification" in str(config.architectures) else "value"
        model = load_model(kind, folder, tokenizer, args, trained=False)

        # --- values
        pictures = []
        if rows:
            pairs = choose_pairs(with_tokens(rows, tokenizer, args, kind), args)
            pair_values = predict_pairs(model, kind, pairs, config, tokenizer, args)
            tables[label] = table_of(kind, pairs, pair_values, config, args)
            say_what_is_missing(label, tables[label], pairs, args)
            if not baselines:  # on the pairs that the first model's length limits leave
                baselines = baseline_tables(pairs, averages, args)
            records += pair_records(label, pairs, pair_values, args)
            if kind == "value":
                for pair, of_pair in zip(pairs[: args.draw], pair_values[: args.draw], strict=True):
                    # the first rejected answer, after all right ones
                    wrong = pair[0]["right"] if args.source == "best-of" else 1
                    pictures.append(picture("chosen: ", pair[0], of_pair[0], tokenizer))
                    pictures.append(picture("rejected: ", pair[wrong], of_pair[wrong], tokenizer))
        if texts and kind == "value":
            text_rows = with_tokens(texts, tokenizer, args)
            text_values = predict(model, kind, text_rows, tokenizer, args)
            for row, token_values in zip(text_rows, text_values, strict=True):
                pictures.append(picture("", row, token_values, tokenizer))

        # --- save
        if pictures and first_rank:
            drawings += 1
            path = f"{args.run_dir}/values"
            if drawings > 1:
                path += f"_{drawings}"
            note(f"{label}\n{draw_values(pictures, path)}")
        model = None  # before the next one is loaded
        gc.collect()
    if first_rank and tables:
        save(tables | baselines, records, args)
