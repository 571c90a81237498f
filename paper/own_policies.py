"""A real language model, a reward that nobody here wrote: DVPO against PPO, GRPO and ReMax; RPO against DRO-V,
KTO, DPO and SFT; GVM against reward model and critic. On your model, your prompts, your reward.

    python paper/own_policies.py --model SmolLM2-135M-Instruct --dataset prompts.jsonl \\
        --reward paper.text_rewards:vader \\
        --eval-reward paper.text_rewards:afinn paper.text_rewards:real_words paper.text_rewards:on_topic

For each seed: the policy answers every prompt `--samples` times, `--reward` scores the answers, and a share of
the prompts is held out. From the others' answers come the GVMs (one from scores, one from pairs) and the
offline policies; the online policies answer the same prompts anew. All start from `--model`, all are judged
by fresh answers to the held-out prompts, by `--reward` and by `--eval-reward`, which nothing was trained on.
A seed changes the sampling, the held-out prompts, the pairs, the order of the data and the evaluation.

    --set grpo "--lr 3e-5"     options of one job, in place of those here; `--set gvm_scores "--lam 1"`
    --tune 1e-5 3e-5 1e-4      one run a rate of every method, on `--tune-seed`, which is not counted

What was measured goes to `--results`, a line for each run, and is not measured again: a folder of runs may be
deleted, a further seed may come another day. The tables and pictures are made of that file alone.
"""

import argparse
import json
import math
import os
import random
import shlex
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.data import columns_of_prompt, hold_out_prompts, prompt_key, read_rows
from common.tables import markdown
from paper import frontiers
from paper.report import axes_of, curve, minus, rounded, rows_of, spread, verdict
from tools.jobs import ROOT, Job, Jobs

ONLINE = {
    "ppo": "PPO",
    "dvpo": "DVPO, GVM from scores",
    "dvpo_pairs": "DVPO, GVM from pairs",
    "grpo": "GRPO",
    "remax": "ReMax",
}
OFFLINE = {
    "sft": "SFT, best answers",
    "rpo": "RPO",
    "dro": "DRO-V",
    "kto": "KTO",
    "dpo": "DPO",
}
REFERENCE = "reference"
NAMES = {REFERENCE: "before"} | ONLINE | OFFLINE
COLOURS = {
    "ppo": "#444",
    "dvpo": "#2a7",
    "dvpo_pairs": "#27a",
    "grpo": "#c63",
    "remax": "#92c",
    "sft": "#999",
    "rpo": "#2a7",
    "dro": "#27a",
    "kto": "#c63",
    "dpo": "#92c",
}
VALUE_MODELS = {
    "gvm_scores/model": "GVM from scores",
    "gvm_pairs/model": "GVM from pairs",
    "reward/model": "scalar reward model",
    "ppo/critic": "PPO's critic at the end of its run",
}

# The options of each job that `--set` replaces. The rates are where a search begins, see docs/results/own_policies.md.
OPTIONS = {
    "gvm_scores": "--lr 1e-4 --batch-size 32",
    "gvm_pairs": "--lr 1e-4 --batch-size 16",
    "reward": "--lr 1e-4 --batch-size 16 --epochs 1",
    "ppo": "--lr 3e-5 --critic-lr 3e-5 --beta 0.02",
    "dvpo": "--lr 3e-5 --beta 0.05",
    "dvpo_pairs": "--lr 3e-5 --beta 0.05",
    "grpo": "--lr 3e-5 --group-size 8",
    "remax": "--lr 3e-5 --beta 0.02",
    "sft": "--lr 3e-5 --batch-size 32 --epochs 2",
    "rpo": "--lr 3e-5 --batch-size 32",
    "dro": "--lr 3e-5 --value-lr 3e-5 --batch-size 32",
    "kto": "--lr 3e-5 --batch-size 32",
    "dpo": "--lr 3e-5 --batch-size 16",
}
AGAINST = {"online": "ppo", "offline": "rpo"}  # whom the others are compared with at equal KL
KLS = (1.0, 2.0, 4.0, 8.0)  # nats at which they are
READ = 8  # of so many held-out prompts, the answer to one is kept to be read


# --- the data -----------------------------------------------------------------------------------------------


def write_prompts(args: argparse.Namespace) -> None:
    """The prompts of `--dataset` that have at most --max-characters, once each."""
    rows = []
    for row in read_rows(args.dataset, "prompts"):
        if len(row["prompt"]) <= args.max_characters:
            rows.append({**about_prompt(row), "prompt": row["prompt"]})
    write_rows(args.run_dir / "prompts.jsonl", rows)


def write_data(args: argparse.Namespace) -> None:
    """Training and test rows of the answers, and pairs of them. The test prompts are those that the online
    scripts hold out with the same seed."""
    prompts = read_rows(args.prompt_file, "prompts")
    _, held_out = hold_out_prompts(prompts, args.prompts, args.data_seed)
    test_prompts = {prompt_key(row["prompt"]) for row in held_out}
    parts = {"train": [], "test": []}
    for row in read_rows(args.answers, "scored"):
        part = "test" if prompt_key(row["prompt"]) in test_prompts else "train"
        kept = ("prompt", "response", "reward", "policy", "truncated")  # a cut answer stays cut
        parts[part].append(about_prompt(row) | {key: row[key] for key in kept})
    middle = statistics.median(row["reward"] for row in parts["train"])
    for part, rows in parts.items():
        for row in rows:
            row["label"] = row["reward"] > middle  # KTO's
        write_rows(args.run_dir / f"{part}.jsonl", rows)
        write_rows(args.run_dir / f"{part}_pairs.jsonl", pairs_of(rows, args.samples // 2, args.data_seed))
    write_rows(args.run_dir / "best.jsonl", best_of(parts["train"]))


def about_prompt(row: dict) -> dict:
    """The columns of a row that a template or a reward function may read, tools or a solution."""
    columns = columns_of_prompt(row)
    return {key: value for key, value in columns.items() if key not in ("rewards", "truncated")}


def by_prompt(rows: list[dict]) -> list[list[dict]]:
    """The rows of each prompt."""
    groups = {}
    for row in rows:
        groups.setdefault(prompt_key(row["prompt"]), []).append(row)
    return list(groups.values())


def pairs_of(rows: list[dict], count: int, seed: int) -> list[dict]:
    """At most `count` pairs of each prompt's answers, drawn at random among those of different rewards."""
    rng = random.Random(seed)
    pairs = []
    for group in by_prompt(rows):
        found = [(a, b) for a in group for b in group if a["reward"] > b["reward"]]
        for better, worse in rng.sample(found, min(count, len(found))):
            pair = {
                **about_prompt(better),
                "prompt": better["prompt"],
                "chosen": better["response"],
                "rejected": worse["response"],
            }
            pairs.append(pair)
    return pairs


def best_of(rows: list[dict]) -> list[dict]:
    """The answer of each prompt with the highest reward."""
    return [max(group, key=lambda row: row["reward"]) for group in by_prompt(rows)]


def write_rows(file: Path, rows: list[dict]) -> None:
    """A file of JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")
    print(f"{file.name}: {len(rows)} rows")


# --- the commands -------------------------------------------------------------------------------------------


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """All jobs by name. tools/jobs.py says what the braces mean."""
    prompts = "{out}/prompts/prompts.jsonl"
    rewards = [args.reward, *args.eval_reward]
    lengths = ["--max-prompt-length", str(args.max_prompt_length)]
    lengths += ["--max-response-length", str(args.max_response_length)]
    seeds = ["--seed", "{seed}", "--split-seed", "{seed}"]
    common = [*lengths, *seeds, *shlex.split(args.flags), "--save-every", "0", "--overwrite"]
    start = ["--model", args.model, *common]
    sample = ["evaluate.py", "responses", "--dataset", prompts, "--temperature", "1", *lengths, *seeds]
    sample += ["--reward", *rewards, *shlex.split(args.flags), "--overwrite"]

    test = ["--eval-dataset", "{home}/data/test.jsonl", "--eval-split", "train", "--eval-source", "scores"]
    every = ["--eval-every", str(max(1, args.steps // args.evaluations))]
    judged = ["--eval-reward", *rewards, "--eval-prompts", str(args.prompts)]
    online = [*start, "--dataset", prompts, "--steps", str(args.steps), "--batch-size", str(args.batch_size)]
    online += ["--warmup-steps", "2", *every, *judged]
    halves = ["--mini-batch-size", str(args.batch_size // 2), "--epochs", "1"]
    whole = ["--mini-batch-size", str(args.batch_size)]
    every_offline = ["--eval-every", str(max(1, args.offline_steps // args.evaluations))]

    def offline(kind: str) -> list[str]:
        """The options of a method that learns from train{kind}.jsonl."""
        words = [*start, "--dataset", f"{{home}}/data/train{kind}.jsonl", "--warmup-steps", "5", *judged]
        words += ["--eval-dataset", f"{{home}}/data/test{kind}.jsonl", "--eval-split", "train"]
        return [*words, *every_offline, "--steps", str(args.offline_steps), "--no-precompute-ref"]

    no_eval = ["--eval-every", "0"]

    jobs = {}
    jobs["prompts"] = ["paper/own_policies.py", "--write-prompts", "--dataset", args.dataset]
    jobs["prompts"] += ["--max-characters", str(args.max_characters)]
    jobs["answers"] = [*sample, "--models", args.model, "--names", REFERENCE, "--samples", str(args.samples)]
    jobs["data"] = ["paper/own_policies.py", "--write-data", "--prompt-file", prompts]
    jobs["data"] += ["--answers", f"{{home}}/answers/{REFERENCE}/scored.jsonl", "--data-seed", "{seed}"]
    jobs["data"] += ["--prompts", str(args.prompts), "--samples", str(args.samples)]

    jobs["gvm_scores"] = ["gvm_td.py", *start, "--dataset", "{home}/data/train.jsonl", "--source", "scores"]
    jobs["gvm_scores"] += [*test, *no_eval]
    jobs["gvm_pairs"] = ["gvm_td.py", *start, "--dataset", "{home}/data/train_pairs.jsonl", *test, *no_eval]
    jobs["reward"] = ["reward.py", *start, "--dataset", "{home}/data/train_pairs.jsonl", *no_eval]
    jobs["reward"] += ["--eval-dataset", "{home}/data/test_pairs.jsonl", "--eval-split", "train"]

    jobs["ppo"] = ["ppo.py", *online, *halves, "--reward", args.reward]
    jobs["dvpo"] = ["dvpo.py", *online, *halves, "--gvm", "{home}/gvm_scores/model"]
    jobs["dvpo_pairs"] = ["dvpo.py", *online, *halves, "--gvm", "{home}/gvm_pairs/model"]
    jobs["grpo"] = ["grpo.py", *online, *halves, "--reward", args.reward]
    jobs["remax"] = ["remax.py", *online, *whole, "--reward", args.reward]

    jobs["sft"] = ["sft.py", *start, "--dataset", "{home}/data/best.jsonl", "--warmup-steps", "5", *judged]
    jobs["sft"] += every_offline
    jobs["rpo"] = ["rpo.py", *offline("")]
    jobs["dro"] = ["dro.py", *offline("")]
    jobs["kto"] = ["kto.py", *offline("")]
    jobs["dpo"] = ["dpo.py", *offline("_pairs")]

    options = OPTIONS | dict(args.set)
    for name, flags in options.items():
        jobs[name] = [*jobs[name], *shlex.split(flags)]
    for name in [*ONLINE, *OFFLINE]:
        for rate in args.tune:
            jobs[tuned(name, rate)] = with_rate(jobs[name], rate)

    measure = [*sample, "--prompts", str(args.prompts), "--samples", str(args.eval_samples)]
    for name in [name for name in jobs if name.partition("_lr")[0] in NAMES]:
        jobs[f"measured_{name}"] = [*measure, "--models", f"{{home}}/{name}/model", "--names", name]
    jobs[f"measured_{REFERENCE}"] = [*measure, "--models", args.model, "--names", REFERENCE]

    judge = ["evaluate.py", "values", "--draw", "0", *lengths, *seeds, *shlex.split(args.flags)]
    judge += ["--source", "scores", "--models", *[f"{{home}}/{model}" for model in VALUE_MODELS]]
    jobs["values"] = [*judge, "--dataset", "{home}/data/test.jsonl"]
    # what a policy writes that has learned: other answers than those of training
    jobs["values_shifted"] = [*judge, "--dataset", "{home}/measured_grpo/grpo/scored.jsonl"]
    return jobs


def tuned(name: str, rate: str) -> str:
    """The job of a method with another learning rate."""
    return f"{name}_lr{rate}".replace("-", "_").replace(".", "_")


def with_rate(words: list[str], rate: str) -> list[str]:
    """A command with another learning rate, of its critic or value model too."""
    words = list(words)
    for i, word in enumerate(words):
        if word in ("--lr", "--critic-lr", "--value-lr"):
            words[i + 1] = rate
    return words


# --- what was measured --------------------------------------------------------------------------------------


class Results:
    """The lines of `--results`, one for each run that was measured, by (seed, name)."""

    def __init__(self, file: Path):
        self.file = file
        self.found: dict[tuple[int, str], dict] = {}
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                self.found[record["seed"], record["name"]] = record

    def add(self, record: dict) -> None:
        """Writes all under another name and renames it: a kill loses nothing."""
        self.found[record["seed"], record["name"]] = record
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".part")
        lines = [json.dumps(self.found[key], ensure_ascii=False) + "\n" for key in sorted(self.found)]
        new.write_text("".join(lines), encoding="utf-8")
        new.rename(self.file)

    def seeds(self, names: list[str]) -> list[int]:
        """The seeds that have all of the names."""
        seeds = {seed for seed, _ in self.found}
        return sorted(seed for seed in seeds if all((seed, name) in self.found for name in names))


def record_of(jobs: Jobs, seed: int, name: str) -> dict:
    """What is kept of a finished job `measured_X` or `values`."""
    measuring = Job(seed, name)
    record = {"seed": seed, "name": name.removeprefix("measured_")}
    if name.startswith("values"):
        record |= provenance(jobs, measuring)
        found = json.loads((jobs.folder(measuring) / "values.json").read_text())["accuracy"]
        record["accuracy"] = {}
        for model, table in found.items():
            if "/" in model:
                model = "/".join(Path(model).parts[-2:])
            record["accuracy"][model] = rounded(table["all"])
        return record
    name = record["name"]
    found = json.loads((jobs.folder(measuring) / "responses.json").read_text())["models"][name]
    record["measured"] = {key: rounded(value["mean"]) for key, value in found.items()}
    file = jobs.folder(measuring) / name / "responses.jsonl"
    answers = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    per_prompt = len(answers) // len({row["row"] for row in answers})
    record["samples"] = [[row["prompt"], row["response"]] for row in answers[:: READ * per_prompt]]
    if name == REFERENCE:
        return record | provenance(jobs, measuring)
    job = Job(seed, name)
    record |= provenance(jobs, job)
    folder = jobs.folder(job)
    steps = [row["time/step_s"] for row in rows_of(folder) if "time/step_s" in row]
    record["step_seconds"] = rounded(statistics.median(steps))
    record["curve"] = []
    for row in curve(folder, "eval/length"):
        point = {key.removeprefix("eval/"): rounded(value) for key, value in row.items()}
        record["curve"].append(point)
    return record


def provenance(jobs: Jobs, job: Job) -> dict:
    """How long a job took and what it ran, without the folders of this machine."""
    record = jobs.record(job)
    words = []
    for word in record["command"]:
        word = word.replace(str(jobs.out), "OUT")
        words.append(Path(word).name if word.startswith("/") else word)
    return {
        "seconds": record["seconds"],
        "command": shlex.join(words),
        "commit": record["commit"],
        "date": record["date"],
    }


# --- tables and pictures ------------------------------------------------------------------------------------


def short(reward: str) -> str:
    """The column of a reward."""
    return reward.rpartition(":")[2]


def policies_table(results: Results, names: dict[str, str], seeds: list[int], rewards: list[str]) -> str:
    """A row for each method: what fresh answers to held-out prompts are worth, and what it took."""
    columns = [*map(short, rewards), "distinct_2", "length"]
    head = ["", *columns, "KL (nats)", "seconds a step", "seconds"]
    rows = []
    for name, label in names.items():
        found = [results.found[seed, name] for seed in seeds]
        cells = [label]
        for column in columns:
            cells.append(spread([record["measured"][column] for record in found]))
        if name == REFERENCE:
            rows.append([*cells, "0", "-", "-"])
            continue
        kl = [record["curve"][-1].get("kl", math.nan) for record in found]
        cells.append("-" if any(map(math.isnan, kl)) else spread(kl))
        cells.append(spread([record["step_seconds"] for record in found], 1))
        cells.append(spread([record["seconds"] for record in found], 0))
        rows.append(cells)
    return markdown(head, rows)


def differences(results: Results, names: list[str], seeds: list[int], reward: str) -> str:
    """Each method's training reward above that of the first of `names`, paired by seed."""

    def measured(name: str) -> list[float]:
        return [results.found[seed, name]["measured"][short(reward)] for seed in seeds]

    first, *others = names
    lines = []
    for name in others:
        above = verdict(minus(measured(name), measured(first)))
        lines.append(f"- {NAMES[name]}, {short(reward)} above {NAMES[first]}: {above}")
    return "\n".join(lines)


def at_equal_kl(results: Results, names: list[str], seeds: list[int], reward: str, against: str) -> str:
    """Each method compared with `against` where both have the same KL: the reward on the way of training,
    between two evaluations on a straight line, paired by seed."""

    def differences_at(name: str, kl: float) -> list[float]:
        found = []
        for seed in seeds:
            ours = frontiers.reward_at(way_of(results.found[seed, name], reward), kl)
            theirs = frontiers.reward_at(way_of(results.found[seed, against], reward), kl)
            if ours is not None and theirs is not None:
                found.append(ours - theirs)
        return found

    rows = []
    for name in names:
        if name != against:
            cells = [frontiers.word(differences_at(name, kl), len(seeds)) for kl in KLS]
            rows.append([NAMES[name], *cells])
    head = [f"{short(reward)}, compared with {NAMES[against]}", *[f"KL {kl:g}" for kl in KLS]]
    return markdown(head, rows)


def way_of(record: dict, reward: str) -> list[tuple[float, float]]:
    """(KL, reward) at each evaluation of a run, in the order of the KL; empty for a method without a KL."""
    points = [(point["kl"], point[short(reward)]) for point in record["curve"] if "kl" in point]
    return sorted(points)


def values_table(results: Results, seeds: list[int]) -> str:
    """Share of the pairs of answers that each model orders rightly, by its mean and by its last value."""
    rows = []
    for where, label in {"values": "as in training", "values_shifted": "of the GRPO policy"}.items():
        found = [results.found[seed, where]["accuracy"] for seed in seeds]
        for model in found[0]:
            cells = [label, VALUE_MODELS.get(model, model)]
            for statistic in ("mean", "last", "score"):
                shares = [table[model][statistic] for table in found if statistic in table[model]]
                cells.append(spread(shares, 3) if shares else "")
            rows.append(cells)
    return markdown(["answers", "model", "mean", "last", "score"], rows)


def samples_table(results: Results, names: dict[str, str], seed: int, most: int) -> str:
    """The first answers of each policy, to be read before any number is believed."""
    rows = []
    kept = len(results.found[seed, REFERENCE]["samples"])
    for i in range(min(most, kept)):
        for name, label in names.items():
            prompt, response = results.found[seed, name]["samples"][i]
            rows.append([in_a_cell(prompt), label, in_a_cell(response)])
    return markdown(["prompt", "policy", "answer"], rows)


def in_a_cell(text: str) -> str:
    """A text that Markdown shows as it is written."""
    return " ".join(text.split()).replace("<", "&lt;")


def draw(results: Results, names: dict[str, str], seeds: list[int], reward: str, file: Path) -> None:
    """The training reward over seconds of training and over KL; a thin line a seed, a thick one for the
    mean."""
    figure, (left, right) = axes_of(2, 4)
    for name, label in names.items():
        found = [results.found[seed, name] for seed in seeds]
        length = min(len(record["curve"]) for record in found)
        curves = []  # of each seed: (seconds, kl, reward) by evaluation
        for record in found:
            points = record["curve"][:length]
            seconds = [point["step"] * record["step_seconds"] for point in points]
            kl = [point.get("kl", math.nan) for point in points]
            curves.append((seconds, kl, [point[short(reward)] for point in points]))
        for seconds, kl, values in curves:
            left.plot(seconds, values, color=COLOURS[name], alpha=0.25, linewidth=1)
            right.plot(kl, values, color=COLOURS[name], alpha=0.25, linewidth=1)
        seconds, kl, values = (means(column) for column in zip(*curves, strict=True))
        left.plot(seconds, values, color=COLOURS[name], linewidth=2, label=label)
        right.plot(kl, values, color=COLOURS[name], linewidth=2, marker="o", markersize=3)
    left.set_xlabel("seconds of training, one core")
    right.set_xlabel("KL to the policy before training, nats per answer")
    left.set_ylabel(f"{short(reward)}, held-out prompts")
    left.legend(frameon=False)
    figure.savefig(file, dpi=110)


def means(columns: tuple[list[float], ...]) -> list[float]:
    """Mean over seeds, point by point."""
    return [statistics.fmean(values) for values in zip(*columns, strict=True)]


def tuning_table(results: Results, seed: int, rates: list[str], rewards: list[str]) -> str:
    """The reward, KL and what else was measured with each learning rate."""
    rows = []
    for name, label in (ONLINE | OFFLINE).items():
        for rate in rates:
            record = results.found.get((seed, tuned(name, rate)))
            if record is None:
                continue
            cells = [label, rate]
            cells += [f"{record['measured'][short(reward)]:.2f}" for reward in rewards]
            kl = record["curve"][-1].get("kl")
            rows.append([*cells, "-" if kl is None else f"{kl:.1f}"])
    return markdown(["", "rate", *map(short, rewards), "KL (nats)"], rows)


def report(args: argparse.Namespace, results: Results) -> str:
    """All tables that the results are complete for, over the counted seeds."""
    rewards = [args.reward, *args.eval_reward]
    parts = []
    for title, methods in {"online": ONLINE, "offline": OFFLINE}.items():
        names = {name: label for name, label in NAMES.items() if name in args.only and name in methods}
        shown = {REFERENCE: NAMES[REFERENCE]} | names
        seeds = [seed for seed in results.seeds([*shown]) if seed != args.tune_seed]
        if not names or not seeds:
            continue
        table = policies_table(results, shown, seeds, rewards)
        draw(results, names, seeds, args.reward, args.out / f"real_{title}.png")
        samples = samples_table(results, shown, seeds[0], 4)
        compared = differences(results, [*shown], seeds, args.reward)
        compared += "\n" + differences(results, [*names], seeds, args.reward)
        if AGAINST[title] in names:
            equal = at_equal_kl(results, [*names], seeds, args.reward, AGAINST[title])
            compared += f"\n\nOn the way of training, at equal KL:\n\n{equal}"
        parts.append(f"## {title}, seeds {seeds}\n\n{table}\n\n{compared}\n\n{samples}")
    seeds = [seed for seed in results.seeds(["values", "values_shifted"]) if seed != args.tune_seed]
    if seeds:
        parts.append(f"## value models, seeds {seeds}\n\n{values_table(results, seeds)}")
    if args.tune:
        table = tuning_table(results, args.tune_seed, args.tune, rewards)
        parts.append(f"## rates, seed {args.tune_seed}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def wanted_jobs(args: argparse.Namespace) -> list[tuple[int, str]]:
    """The jobs that measure: of the counted seeds, or with `--tune` of the other."""
    if args.tune:
        wanted = []
        for rate in args.tune:
            wanted += [(args.tune_seed, f"measured_{tuned(name, rate)}") for name in args.only]
        return wanted
    wanted = []
    for seed in args.seeds:
        wanted += [(seed, f"measured_{name}") for name in [REFERENCE, *args.only]]
        if args.values:
            wanted += [(seed, "values"), (seed, "values_shifted")]
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="policy that all start from: folder or hub id")
    parser.add_argument("--dataset", help="prompts: hub id or file")
    parser.add_argument("--reward", help="reward model or module:function that is trained on")
    parser.add_argument("--eval-reward", nargs="*", default=[], help="those that only judge")
    parser.add_argument(
        "--max-characters", type=int, default=120, help="of a prompt; longer ones are left out"
    )
    parser.add_argument(
        "--samples", type=int, default=8, help="answers to each prompt, to learn from offline"
    )
    parser.add_argument("--prompts", type=int, default=64, help="held out of all training, and measured")
    parser.add_argument("--eval-samples", type=int, default=4, help="answers to each of those")
    parser.add_argument("--max-prompt-length", type=int, default=128, help="tokens")
    parser.add_argument("--max-response-length", type=int, default=32, help="tokens")
    parser.add_argument("--batch-size", type=int, default=32, help="answers in a step of an online method")
    parser.add_argument("--steps", type=int, default=24, help="of the online methods")
    parser.add_argument("--offline-steps", type=int, default=98, help="of RPO, DRO-V, KTO, DPO")
    parser.add_argument("--evaluations", type=int, default=3, help="in each run, besides the first")
    parser.add_argument("--flags", default="", help="options of every script, e.g. '--precision bf16'")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("JOB", "OPTIONS"), help="as above"
    )
    methods = [*ONLINE, *OFFLINE]
    parser.add_argument("--only", nargs="+", default=methods, choices=methods, help="these methods")
    parser.add_argument(
        "--values",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="judge the value models too; this trains PPO and GRPO",
    )
    parser.add_argument("--tune", nargs="*", default=[], help="learning rates to try on --tune-seed")
    parser.add_argument("--tune-seed", type=int, default=0, help="of the search; never counted")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="everything is done for each")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/own"), help="all runs lie in it")
    parser.add_argument("--results", type=Path, help="what was measured; default: OUT/results.jsonl")
    parser.add_argument("--report", action="store_true", help="only make the tables of --results")
    parser.add_argument("--write-prompts", action="store_true", help=argparse.SUPPRESS)  # the job `prompts`
    parser.add_argument("--write-data", action="store_true", help=argparse.SUPPRESS)  # the job `data`
    parser.add_argument("--prompt-file", help=argparse.SUPPRESS)
    parser.add_argument("--answers", help=argparse.SUPPRESS)
    parser.add_argument("--data-seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_prompts:
        write_prompts(args)
        return
    if args.write_data:
        write_data(args)
        return
    if not args.reward or not (args.report or (args.model and args.dataset)):
        sys.exit("error: give --model, --dataset and --reward")
    unknown = sorted({name for name, _ in args.set} - set(OPTIONS))
    if unknown:
        sys.exit(f"error: --set {unknown[0]}: no such job; those are {', '.join(OPTIONS)}")
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # a --reward of yours (module:function) is found where you are
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), str(ROOT)])
    args.out = args.out.resolve()
    results = Results(args.results or args.out / "results.jsonl")
    if not args.report:
        measured = []
        for seed, name in wanted_jobs(args):
            if (seed, name.removeprefix("measured_")) not in results.found:
                measured.append((seed, name))
        jobs = Jobs(args.out, commands(args), measured, shared={"prompts"})
        for seed, name in measured:
            if jobs.done(Job(seed, name)):  # and stopped before it was written down
                results.add(record_of(jobs, seed, name))
        jobs.run(args.workers, finished=lambda job: keep(results, jobs, job, measured))
    args.out.mkdir(parents=True, exist_ok=True)
    text = report(args, results)
    (args.out / "table-own.md").write_text(text, encoding="utf-8")
    print(text)


def keep(results: Results, jobs: Jobs, job: Job, measured: list[tuple[int, str]]) -> None:
    """Writes down what a finished job measured."""
    if tuple(job) in measured:
        results.add(record_of(jobs, *job))


if __name__ == "__main__":
    main()
