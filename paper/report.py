"""Tables and pictures from the runs of paper/tables.py. Each function takes the folder of all runs and the
seeds, and returns markdown; `TABLES` says which jobs it reads. A claim holds where the 95 % t interval of its
difference, paired by seed, lies on the claimed side of 0."""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from common.tables import markdown


class Claim(NamedTuple):
    """A row of the table of claims."""

    what: str
    paper: str
    """the paper's figures, on its models"""
    here: str


class Format(NamedTuple):
    """How a metric is printed."""

    scale: float
    """what it is multiplied by: 100 for per cent"""
    digits: int


# The statistics of token values by which a value model judges a pair (those that a mean over tokens, a
# quantile or the last
# token give), then those of other models.
TOKEN_STATISTICS = ("mean", "p1", "p5", "p10", "p90", "p95", "p99", "last")
STATISTICS = (*TOKEN_STATISTICS, "backup", "score")


# --- what the runs hold -------------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[dict]:
    """The metrics of a run, a row per line."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path, key: str = "eval/reward") -> list[dict]:
    """The evaluations of a run."""
    return [row for row in rows_of(folder) if key in row]


def home(out: Path, seed: int, job: str) -> Path:
    """The run folder of a job."""
    return out / f"seed{seed}" / job


def final(out: Path, seed: int, job: str, key: str) -> float:
    """A metric of a run's last evaluation."""
    return curve(home(out, seed, job), key)[-1][key]


def answers(out: Path, seed: int, job: str, name: str) -> tuple[list[dict], dict]:
    """The responses of one model in a run of `evaluate.py responses`, and its line of the summary."""
    folder = home(out, seed, job)
    text = (folder / name / "responses.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    summary = json.loads((folder / "responses.json").read_text())
    return rows, summary["models"][name]


def mean_of(out: Path, seed: int, job: str, name: str, key: str = "reward") -> float:
    """The mean of what `evaluate.py responses` measured of one model."""
    _, summary = answers(out, seed, job, name)
    return summary[key]["mean"]


def accuracy(out: Path, seed: int, job: str) -> dict[str, dict]:
    """Tables of a run of `evaluate.py values` by the job that trained the model, or the baseline's name."""
    found = json.loads((home(out, seed, job) / "values.json").read_text())["accuracy"]
    tables = {}
    for name, table in found.items():
        if "/" in name:  # a path: the job and what it is called there, e.g. ppo/critic
            name = "/".join(Path(name).parts[-2:])
        tables[name] = table
    return tables


def wins(out: Path, seed: int, job: str, name: str, against: str) -> float:
    """Share of prompts on which the true reward is higher than the other model's; a tie is half."""
    ours = true_rewards(out, seed, job, name)
    theirs = true_rewards(out, seed, job, against)
    points = []
    for our_reward, their_reward in zip(ours, theirs, strict=True):
        if our_reward > their_reward:
            points.append(1.0)
        elif our_reward == their_reward:
            points.append(0.5)
        else:
            points.append(0.0)
    return statistics.fmean(points)


def true_rewards(out: Path, seed: int, job: str, name: str) -> list[float]:
    """The embedded world's own reward of each response of a model."""
    from assets.reviews import reward

    rows, _ = answers(out, seed, job, name)
    prompts = [row["prompt"] for row in rows]
    responses = [row["response"] for row in rows]
    return reward(prompts, responses)


# --- cells and tables ---------------------------------------------------------------------------------------


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds."""
    values = list(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


# Of Student's t by degrees of freedom: 97.5 % of it lie below.
T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
T_975 += [2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]


def rounded(value):
    """Four significant digits of each number in a JSON value."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value


def half_interval(values: list[float]) -> float:
    """Half of the 95 % t interval of the mean; infinite for a single value."""
    count = len(values)
    if count == 1:
        return math.inf
    quantile = T_975[min(count - 2, len(T_975) - 1)]  # of more values: a little too wide
    return quantile * statistics.stdev(values) / math.sqrt(count)


def verdict(differences: list[float]) -> str:
    """Whether a claimed positive difference is there: by the 95 % t interval of the differences, paired by
    seed."""
    count = len(differences)
    mean = statistics.fmean(differences)
    if count == 1:
        return f"one seed, no interval ({mean:+.3g})"
    half = half_interval(differences)
    numbers = f"{mean:+.3g} ± {half:.2g}, {count} seeds"
    if mean - half > 0:
        return f"**holds** ({numbers})"
    if mean + half < 0:
        return f"**does not hold** ({numbers})"
    return f"not separated ({numbers})"


def share_of_gain(drops: list[float], gains: list[float]) -> str:
    """The mean drop in per cent of the mean gain over the SFT policy."""
    share = statistics.fmean(drops) / statistics.fmean(gains)
    return f"{100 * share:.0f} % of the gain over SFT"


def minus(ours: list[float], theirs: list[float]) -> list[float]:
    """Differences, seed by seed."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def claims(rows: list[Claim]) -> str:
    """The table of claims."""
    return markdown(["claim", "the paper's figures, on its models", "here"], rows)


# --- 2502.16944: policies -----------------------------------------------------------------------------------

MEASURED = ["true reward", "grammatical, %", "wins against SFT, %", "distinct-2", "length"]


def measured(out: Path, seeds: list[int], job: str, names: dict[str, str], against: str) -> list[list[str]]:
    """A row per model of a run of `evaluate.py responses`, under the columns `MEASURED`."""
    rows = []
    for name, label in names.items():
        rewards = [mean_of(out, seed, job, name) for seed in seeds]
        grammatical = [100 * mean_of(out, seed, job, name, "grammatical") for seed in seeds]
        distinct_2 = [mean_of(out, seed, job, name, "distinct_2") for seed in seeds]
        length = [mean_of(out, seed, job, name, "length") for seed in seeds]
        won = "-"
        if name != against:
            won = spread([100 * wins(out, seed, job, name, against) for seed in seeds], 0)
        rows.append(
            [
                label,
                spread(rewards),
                spread(grammatical, 0),
                won,
                spread(distinct_2, 3),
                spread(length, 1),
            ]
        )
    return rows


POLICIES = {
    "before": "SFT",
    "dpo": "DPO",
    "remax": "ReMax",
    "grpo": "GRPO",
    "ppo": "PPO",
    "dvpo": "DVPO, GVM from the reward model's scores",
    "dvpo_pairs": "DVPO, GVM from preferences",
}
# AlpacaEval 2 in version 3: of Mistral-7B and Llama-3-8B (table 2, instruct models), then of 3B and 8B (table 1, base)
PAPER_ALPACA = {
    "before": (17.11, 34.38, 8.19, 9.79),
    "dpo": (26.80, 40.32),
    "remax": (20.55, 36.04, 12.02, 9.62),
    "grpo": (27.19, 35.17, 10.86, 10.27),
    "ppo": (19.62, 34.98, 11.54, 11.14),
    "dvpo": (27.43, 42.59, 12.33, 11.33),
}


def alpaca_claim(name: str) -> str:
    """DVPO's figures and another policy's in the paper."""
    models = ("Mistral-7B", "Llama-3-8B", "3B base", "8B base")
    pairs = []
    for model, ours, theirs in zip(models, PAPER_ALPACA["dvpo"], PAPER_ALPACA[name], strict=False):
        pairs.append(f"{model} {ours:.2f} against {theirs:.2f}")
    where = "v3, table 2" if len(pairs) == 2 else "v3, tables 2 and 1"
    return f"AlpacaEval 2: {', '.join(pairs)} ({where})"


def policies(out: Path, seeds: list[int]) -> str:
    """DVPO and what it is compared with, all from one SFT policy."""
    rows = measured(out, seeds, "measured", POLICIES, "before")
    for name, row in zip(POLICIES, rows, strict=True):
        kl = "-"  # the SFT policy is the reference
        if name != "before":
            kl = spread([final(out, seed, name, "eval/kl") for seed in seeds])
        paper = f"{PAPER_ALPACA[name][0]:.2f}" if name in PAPER_ALPACA else "-"
        row += [kl, paper]
    table = markdown(["", *MEASURED, "KL (nats)", "AlpacaEval 2 in the paper (Mistral-7B)"], rows)

    rewards = {}  # by policy, one per seed
    for name in POLICIES:
        rewards[name] = [mean_of(out, seed, "measured", name) for seed in seeds]
    lines = []
    for name in ("before", "dpo", "remax", "grpo", "ppo"):
        scores = verdict(minus(rewards["dvpo"], rewards[name]))
        pairs = verdict(minus(rewards["dvpo_pairs"], rewards[name]))
        here = f"GVM from scores: {scores}; from preferences: {pairs}"
        lines.append(Claim(f"DVPO beats {POLICIES[name]}", alpaca_claim(name), here))

    best = []
    for i in range(len(seeds)):
        name = max(rewards, key=lambda name: rewards[name][i])
        best.append(POLICIES[name].split(",")[0])
    return f"{table}\n\n{claims(lines)}\n\nBest in each seed: {', '.join(best)}."


def beta(out: Path, seeds: list[int]) -> str:
    """DVPO with other KL coefficients."""
    formats = {
        "eval/reward": Format(1, 2),
        "eval/grammatical": Format(100, 0),
        "eval/kl": Format(1, 2),
        "eval/length": Format(1, 1),
    }
    jobs = {"0.1": "dvpo", "0.05": "dvpo_beta_005", "0.01": "dvpo_beta_001"}
    rows = [[label, *final_cells(out, seeds, job, formats)] for label, job in jobs.items()]
    head = ["KL coefficient of DVPO", "true reward", "grammatical, %", "KL (nats)", "length"]
    return markdown(head, rows)


def final_cells(out: Path, seeds: list[int], job: str, formats: dict[str, Format]) -> list[str]:
    """The metrics of a run's last evaluation, over seeds."""
    cells = []
    for key, form in formats.items():
        values = [form.scale * final(out, seed, job, key) for seed in seeds]
        cells.append(spread(values, form.digits))
    return cells


# --- 2502.16944: value models -------------------------------------------------------------------------------


def values(out: Path, seeds: list[int]) -> str:
    """How well value models, a reward model and two baselines judge held-out pairs."""
    names = {
        "gvm_pairs/model": "GVM from preferences",
        "gvm_true/model": "GVM from the data's scores",
        "gvm_scores/model": "GVM from the reward model's scores",
        "reward/model": "scalar reward model",
        "ppo/critic": "PPO's critic",
        "baseline: the longer one": "the longer one wins",
        "baseline: the better policy": "the better author wins",
    }
    found = [accuracy(out, seed, "judged") for seed in seeds]

    def shares(name: str, key: str) -> list[float]:
        """Of pairs judged rightly, one per seed."""
        return [tables[name]["all"][key] for tables in found]

    rows = []
    for name, label in names.items():
        row = [label]
        for key in STATISTICS:
            known = key in found[0][name]["all"]
            row.append(spread(shares(name, key), 3) if known else "")
        rows.append(row)

    means = {key: statistics.fmean(shares("gvm_pairs/model", key)) for key in TOKEN_STATISTICS}
    best = max(means, key=means.get)
    mean = shares("gvm_pairs/model", "mean")
    over_p1 = verdict(minus(mean, shares("gvm_pairs/model", "p1")))
    over_p99 = verdict(minus(mean, shares("gvm_pairs/model", "p99")))
    over_last = verdict(minus(mean, shares("gvm_pairs/model", "last")))
    over_reward_model = verdict(minus(mean, shares("reward/model", "score")))
    lines = [
        Claim(
            "the mean is the best statistic",
            "8B: mean 68.05, P1 57.15, P99 66.3; 13B: 70.55, 63.80, 64.75; "
            "at 3B P90 (64.40) is above the mean (63.61) (v3, table 8)",
            f"best here: {best}; mean over P1: {over_p1}; over P99: {over_p99}; "
            f"over the last token: {over_last}",
        ),
        Claim(
            "a GVM judges answers as well as a scalar reward model",
            "RewardBench, our means of its four subsets: 8B 75.45 against 73.33, "
            "Mistral-7B 66.98 against 67.65 (v3, table 3)",
            f"GVM's mean over the reward model: {over_reward_model}",
        ),
        Claim(
            "preferences make a better GVM than scores",
            "mean 67.85 against 64.51 from a reward model's scores (v3, table 9)",
            verdict(minus(mean, shares("gvm_true/model", "mean"))),
        ),
        Claim(
            "a GVM judges better than PPO's critic",
            "8B 68.1 against 60.6, Mistral-7B 64.5 against 57.6 (v3, table 4)",
            verdict(minus(mean, shares("ppo/critic", "mean"))),
        ),
    ]
    return markdown(["share of held-out pairs", *STATISTICS], rows) + "\n\n" + claims(lines)


def authors(out: Path, seeds: list[int]) -> str:
    """Value models trained on some authors, judged on pairs by those and by others."""
    labels = {
        "gvm_known/model": "GVM from preferences",
        "reward_known/model": "scalar reward model",
        "ppo_known/critic": "PPO's critic",
        "baseline: the longer one": "the longer one wins",
    }
    statistic = {
        "gvm_known/model": "mean",
        "reward_known/model": "score",
        "ppo_known/critic": "mean",
        "baseline: the longer one": "score",
    }
    found = {}
    for job in ("judged_in", "judged_out"):
        found[job] = [accuracy(out, seed, job) for seed in seeds]

    def shares(job: str, name: str, subset: str = "all") -> list[float]:
        """Of pairs judged rightly, one per seed."""
        return [tables[name][subset][statistic[name]] for tables in found[job]]

    rows = []
    for name, label in labels.items():
        row = [label]
        for job in found:
            for subset in ("all", "clear", "close"):
                row.append(spread(shares(job, name, subset), 3))
        rows.append(row)

    gvm = "gvm_known/model"
    critic = "ppo_known/critic"
    scalar = "reward_known/model"
    over_critic_in = verdict(minus(shares("judged_in", gvm), shares("judged_in", critic)))
    over_critic_out = verdict(minus(shares("judged_out", gvm), shares("judged_out", critic)))
    close_in = verdict(minus(shares("judged_in", gvm, "close"), shares("judged_in", scalar, "close")))
    close_out = verdict(minus(shares("judged_out", gvm, "close"), shares("judged_out", scalar, "close")))
    lines = [
        Claim(
            "GVM over PPO's critic, in distribution",
            "UltraFeedback: 8B 68.1 against 60.6, Mistral-7B 64.5 against 57.6 (v3, table 4)",
            over_critic_in,
        ),
        Claim(
            "GVM over PPO's critic, out of distribution",
            "HH-RLHF: 8B 63.3 against 57.5, Mistral-7B 60.8 against 53.8 (v3, table 5)",
            over_critic_out,
        ),
        Claim(
            "GVM over the reward model where the answers are close",
            "RewardBench Chat-Hard: 8B 67.5 against 58.5, Mistral-7B 61.4 against 52.4 (v3, table 3)",
            f"{close_in}; other authors: {close_out}",
        ),
    ]
    head = ["", "authors it was trained on", "clear", "close", "other authors", "clear", "close"]
    return markdown(head, rows) + "\n\n" + claims(lines)


# hidden size by job
SIZES = {"gvm_16": 16, "gvm_32": 32, "gvm_pairs": 64, "gvm_128": 128, "gvm_192": 192}


def parameters(folder: Path) -> int:
    """Of the model that a run exported."""
    from safetensors import safe_open

    with safe_open(folder / "model/model.safetensors", "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118 (it is no dict)


def sizes(out: Path, seeds: list[int]) -> str:
    """Pair accuracy of GVMs of other sizes."""
    rows = []
    means = {}  # by job, one per seed
    for job in SIZES:
        found = [json.loads((home(out, seed, job) / "accuracy.json").read_text()) for seed in seeds]
        row = [f"{parameters(home(out, seeds[0], job)) / 1e6:.2f} M"]
        for key in TOKEN_STATISTICS:
            row.append(spread([shares[key] for shares in found], 3))
        rows.append(row)
        means[job] = [shares["mean"] for shares in found]

    jobs = list(SIZES)
    steps = []
    for smaller, larger in zip(jobs, jobs[1:], strict=False):
        found = verdict(minus(means[larger], means[smaller]))
        steps.append(f"{SIZES[larger]} over {SIZES[smaller]}: {found}")
    paper = "mean 63.61 (Llama 3B), 64.51 (Mistral 7B), 68.05 (Llama 3 8B), 70.55 (Llama 2 13B) (v3, table 8)"
    claim = Claim("accuracy rises with size", paper, "hidden " + "; ".join(steps))
    return markdown(["parameters", *TOKEN_STATISTICS], rows) + "\n\n" + claims([claim])


# --- 2502.16944: pictures and cost --------------------------------------------------------------------------


def axes_of(count: int, height: float = 3.6):
    """A figure with so many axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(4.4 * count, height + 0.6), layout="constrained")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw(axis, folders: list[Path], key: str, label: str, colour: str, stretch: float = 1.0) -> None:
    """Mean over seeds, and a band from the lowest to the highest."""
    runs = [curve(folder, key) for folder in folders]
    steps = [stretch * row["step"] for row in runs[0]]
    by_run = [[row[key] for row in run] for run in runs]
    by_step = list(zip(*by_run, strict=True))
    lowest = [min(values) for values in by_step]
    highest = [max(values) for values in by_step]
    mean = [statistics.fmean(values) for values in by_step]
    axis.fill_between(steps, lowest, highest, color=colour, alpha=0.15, lw=0)
    axis.plot(steps, mean, color=colour, label=label, lw=1.8)


class Line(NamedTuple):
    """A line of a picture."""

    label: str
    colour: str


ONLINE = {
    "ppo": Line("PPO", "#444"),
    "dvpo": Line("DVPO, GVM from scores", "#2a7"),
    "dvpo_pairs": Line("DVPO, GVM from preferences", "#7b3"),
    "grpo": Line("GRPO", "#27a"),
    "remax": Line("ReMax", "#c63"),
}


def curves(out: Path, seeds: list[int]) -> str:
    """Reward, grammar and KL of the online methods over training."""
    titles = {
        "eval/reward": "true reward",
        "eval/grammatical": "share grammatical",
        "eval/kl": "KL to the SFT policy (nats)",
    }
    figure, axes = axes_of(3)
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for job, line in ONLINE.items():
            draw(axis, [home(out, seed, job) for seed in seeds], key, line.label, line.colour)
        axis.set(xlabel="step (256 responses)", title=title)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    figure.savefig(out / "online.png", dpi=120)
    picture = "![reward, grammar and KL of the online methods over training](online.png)"
    return f"{picture}\n\n(Band: lowest to highest seed.)"


def timed_rounds(out: Path, seed: int) -> list[str]:
    """The numbers of the rounds in which the online scripts were timed."""
    rounds = set()
    for folder in home(out, seed, "").glob("timed_ppo_*"):
        if folder.is_dir():  # not the log next to it
            rounds.add(folder.name.rpartition("_")[2])
    return sorted(rounds)


def cost(out: Path, seeds: list[int]) -> str:
    """Median step of short runs made in turn, divided by PPO's of the same round; memory of the state."""
    labels = {"ppo": "PPO", "dvpo": "DVPO", "grpo": "GRPO", "remax": "ReMax"}
    rounds = timed_rounds(out, seeds[0])
    seconds = {}  # by script: the median step of each round
    state = {}  # by script: GB
    for job in labels:
        seconds[job] = []
        for number in rounds:
            rows = rows_of(home(out, seeds[0], f"timed_{job}_{number}"))
            steps = [row for row in rows if "time/step_s" in row][1:]  # the first warms up
            seconds[job].append(statistics.median(row["time/step_s"] for row in steps))
            if number == rounds[0]:
                state[job] = steps[-1]["memory/state_gb"]

    rows = []
    for job, label in labels.items():
        ratios = [a / b for a, b in zip(seconds[job], seconds["ppo"], strict=True)]
        rows.append([label, spread(ratios), f"{state[job] / state['ppo']:.2f}"])
    dvpo_ratios = [a / b for a, b in zip(seconds["dvpo"], seconds["ppo"], strict=True)]
    memory = state["dvpo"] / state["ppo"]
    lines = [
        Claim(
            "a step of DVPO takes 0.57 to 0.69 of PPO's",
            "3B: 13.00 s of 23.00 s; 8B: 48.00 s of 70.24 s (v3, table 7)",
            spread(dvpo_ratios),
        ),
        Claim(
            "its memory is 0.66 to 0.77 of PPO's",
            "whole GPU, 3B: 27.50 of 41.43 GB; 8B: 60.49 of 78.96 GB (v3, table 7)",
            f"{memory:.2f} of weights, gradients, optimizer state and frozen models; "
            "a whole GPU's memory cannot be tested here",
        ),
    ]
    return markdown(["", "time a step / PPO's", "state / PPO's"], rows) + "\n\n" + claims(lines)


# --- 2506.13702: offline methods ----------------------------------------------------------------------------

OFFLINE = {"offline_sft": "SFT", "kto": "KTO", "dro": "DRO-V", "rpo": "RPO", "dpo": "DPO"}
OFFLINE_METRICS = {
    "eval/reward": Format(1, 2),
    "eval/grammatical": Format(100, 0),
    "eval/kl": Format(1, 2),
    "eval/distinct_2": Format(1, 3),
    "eval/pair_accuracy": Format(1, 3),
}
OFFLINE_HEAD = ["true reward", "grammatical, %", "KL (nats)", "distinct-2", "pair accuracy"]


def evaluated(job: str) -> str:
    """The job that holds the evaluations of `job`: SFT's are made by another script, which has a
    reference."""
    if job == "offline_sft":
        return "offline_sft_measured"
    return job


def normalised(job: str) -> str:
    """The length-normalised form of a job; of SFT there is only one."""
    if job == "offline_sft":
        return job
    return f"{job}_normalised"


def offline_row(out: Path, seeds: list[int], job: str, label: str) -> list[str]:
    """A row under the columns `OFFLINE_HEAD`."""
    return [label, *final_cells(out, seeds, evaluated(job), OFFLINE_METRICS)]


def compare(out: Path, seeds: list[int], ours: str, theirs: str, key: str = "eval/reward") -> str:
    """Verdict on `key` of one job over another's. Responses that are no sentences have a true reward of 0,
    above that of a sad review: they are no success."""
    ours = evaluated(ours)
    theirs = evaluated(theirs)
    grammatical = statistics.fmean([final(out, seed, ours, "eval/grammatical") for seed in seeds])
    if key == "eval/reward" and grammatical < 0.5:
        return f"**does not hold**: {100 * grammatical:.0f} % of its answers are grammatical"
    our_values = [final(out, seed, ours, key) for seed in seeds]
    their_values = [final(out, seed, theirs, key) for seed in seeds]
    return verdict(minus(our_values, their_values))


def smallest_kl(out: Path, seeds: list[int], form: str) -> str:
    """Whether RPO's KL is below KTO's and DRO's; `form` is what their jobs' names end in."""
    differences = []
    for seed in seeds:
        kto = final(out, seed, f"kto{form}", "eval/kl")
        dro = final(out, seed, f"dro{form}", "eval/kl")
        rpo = final(out, seed, f"rpo{form}", "eval/kl")
        differences.append(min(kto, dro) - rpo)
    return verdict(differences)


# The win rates are RPO's. v2 judges by GPT-4o and Claude-3.5, v1 by Mistral and LLaMA.
PAPER_OFFLINE = {
    ("rpo", "offline_sft"): "RPO's win rate: Qwen2.5-7B 89.4 and 87.1, FlanT5-XL 86.2 and 84.1 "
    "(GPT-4o and Claude-3.5; v2, table II), FlanT5-XL 83.01 and 68.43 (Mistral and LLaMA; v1, table III)",
    ("rpo", "kto"): "RPO's win rate: Qwen2.5-7B 90.7 and 88.2, FlanT5-XL 92.7 and 90.1 "
    "(GPT-4o and Claude-3.5; v2, table II), FlanT5-XL 93.62 and 61.18 (Mistral and LLaMA; v1, table III)",
    ("rpo", "dro"): "RPO's win rate: Qwen2.5-7B 89.8 and 87.4, FlanT5-XL 85.1 and 83.0 "
    "(GPT-4o and Claude-3.5; v2, table II), FlanT5-XL 83.19 and 67.15 (Mistral and LLaMA; v1, table III)",
    ("kto", "offline_sft"): "BERTScore: Qwen2.5-7B 0.863 against 0.860, FlanT5-XL 0.788 against 0.851; "
    "RPO wins more often against KTO than against SFT (90.7 and 89.4, Qwen2.5-7B, GPT-4o) (v2, table II)",
}


def offline(out: Path, seeds: list[int]) -> str:
    """The offline methods on the same scored responses, with summed and with length-normalised
    log-probabilities."""
    summed_rows = [offline_row(out, seeds, job, label) for job, label in OFFLINE.items()]
    normalised_rows = []
    for job, label in OFFLINE.items():
        if job != "offline_sft":
            normalised_rows.append(offline_row(out, seeds, normalised(job), label))

    lines = []
    for (ours, theirs), paper in PAPER_OFFLINE.items():
        summed = compare(out, seeds, ours, theirs)
        by_length = compare(out, seeds, normalised(ours), normalised(theirs))
        pairs = compare(out, seeds, ours, theirs, "eval/pair_accuracy")
        here = f"reward: {summed}; length-normalised {by_length}; pair accuracy: {pairs}"
        lines.append(Claim(f"{OFFLINE[ours]} beats {OFFLINE[theirs]}", paper, here))
    summed = smallest_kl(out, seeds, "")
    by_length = smallest_kl(out, seeds, "_normalised")
    here = f"summed: {summed}; length-normalised: {by_length}"
    lines.append(Claim("RPO's KL is the smallest", "curves without figures (v2, figure 2)", here))
    return "\n\n".join(
        [
            markdown(["summed log-probabilities", *OFFLINE_HEAD], summed_rows),
            markdown(["length-normalised", *OFFLINE_HEAD], normalised_rows),
            claims(lines),
        ]
    )


# by opponent
PAPER_UNSEEN = {
    "sft": "RPO's win rate, Qwen2.5-7B, GPT-4o: AlpacaEval 79.5, IFEval 81.2, MT-Bench 77.1, GSM8K 73.8 "
    "(v2, table III)",
    "kto": "RPO's win rate, Qwen2.5-7B, GPT-4o: AlpacaEval 63.0, IFEval 63.9, MT-Bench 61.5, GSM8K 58.2 (v2, table III)",
    "dro": "RPO's win rate, Qwen2.5-7B, GPT-4o: AlpacaEval 58.7, IFEval 59.5, MT-Bench 56.8, GSM8K 52.6 (v2, table III)",
}


def unseen(out: Path, seeds: list[int]) -> str:
    """The offline methods on prompts about dishes of the training rows and about others."""
    names = {"before": "before", "sft": "SFT", "kto": "KTO", "dro": "DRO-V", "rpo": "RPO", "dpo": "DPO"}
    titles = {
        "measured_seen": "in domain: prompts about dishes of the training rows",
        "measured_unseen": "out of domain: at least one dish of the prompt in no training row",
    }
    parts = []
    for job, title in titles.items():
        _, summary = answers(out, seeds[0], job, "sft")
        prompts = summary["reward"]["n"]
        table = markdown(["", *MEASURED], measured(out, seeds, job, names, "sft"))
        parts.append(f"**{title}** ({prompts} prompts)\n\n{table}")

    rpo = [mean_of(out, seed, "measured_unseen", "rpo") for seed in seeds]
    lines = []
    for name, paper in PAPER_UNSEEN.items():
        others = [mean_of(out, seed, "measured_unseen", name) for seed in seeds]
        lines.append(Claim(f"RPO beats {names[name]} out of domain", paper, verdict(minus(rpo, others))))
    return "\n\n".join([*parts, claims(lines)])


ABLATIONS = {
    "rpo": "tau 0.3, all responses",
    "rpo_tau_01": "tau 0.1",
    "rpo_tau_1": "tau 1",
    "rpo_no_partition": "no partition value",
    "rpo_no_partition_normalised": "no partition value, length-normalised",
    "rpo_keep_75": "75 % of the responses",
    "rpo_keep_50": "50 %",
    "rpo_keep_25": "25 %",
    "rpo_noise_01": "noise 0.1",
    "rpo_noise_05": "noise 0.5",
    "rpo_noise_10": "noise 1.0",
}


def drop(out: Path, seeds: list[int], job: str) -> str:
    """How much of RPO's gain over SFT the setting of `job` loses, and whether that is separated from 0. No word says
    that a drop is mild: its size does."""
    rpo = [final(out, seed, "rpo", "eval/reward") for seed in seeds]
    other = [final(out, seed, job, "eval/reward") for seed in seeds]
    sft = [final(out, seed, evaluated("offline_sft"), "eval/reward") for seed in seeds]
    lost = share_of_gain(minus(rpo, other), minus(rpo, sft))
    return f"loses {lost}; a drop: {verdict(minus(rpo, other))}"


def ablations(out: Path, seeds: list[int]) -> str:
    """RPO with other settings."""
    rows = [offline_row(out, seeds, job, label) for job, label in ABLATIONS.items()]
    partition = compare(out, seeds, "rpo", "rpo_no_partition")
    partition_normalised = compare(out, seeds, "rpo_normalised", "rpo_no_partition_normalised")
    fewer = []
    for share in (75, 50, 25):
        fewer.append(f"{share} %: {drop(out, seeds, f'rpo_keep_{share}')}")
    noisy = []
    for noise, job in {"0.1": "rpo_noise_01", "0.5": "rpo_noise_05", "1.0": "rpo_noise_10"}.items():
        noisy.append(f"{noise}: {drop(out, seeds, job)}")
    lines = [
        Claim(
            "without the partition value it drops",
            "BERTScore 0.861 against 0.880, win rate over SFT 87.3 against 89.4 (Qwen2.5-7B, GPT-4o; v2, "
            "table V); FlanT5-XL at tau 1: BERTScore 0.7712 against 0.8702, RPO preferred in 95.81 % "
            "(Mistral; v1, tables V and VI)",
            f"{partition}; length-normalised {partition_normalised}",
        ),
        Claim(
            "a drop with fewer responses",
            "win rate, opponent not named, 89.8, 87.7, 85.8 with 75, 50, 25 % of them (v2, table VI); over SFT "
            "89.4 with all (v2, table II) (Qwen2.5-7B, GPT-4o)",
            "; ".join(fewer),
        ),
        Claim(
            "a drop with noise",
            "win rate, opponent not named, 89.9, 87.6, 84.0 at 0.1, 0.5, 1.0 (v2, table VII); over SFT 89.4 without "
            "(v2, table II) (Qwen2.5-7B, GPT-4o)",
            "; ".join(noisy),
        ),
        Claim(
            "trouble at tau 0.1: less grammatical than at 0.3",
            "no grammar; BERTScore 0.862 at tau 0.1, 0.875 at 5, 0.880 at the default (Qwen2.5-7B; v2, tables IV "
            "and II); win rate over SFT at tau 0.1 and 1: FlanT5-XL 90.24 and 83.01, FlanT5-Large "
            "59.50 and 84.20 (Mistral; v1, table IV)",
            compare(out, seeds, "rpo", "rpo_tau_01", "eval/grammatical"),
        ),
    ]
    return markdown(["RPO", *OFFLINE_HEAD], rows) + "\n\n" + claims(lines)


OFFLINE_LINES = {
    "kto": Line("KTO", "#27a"),
    "dro": Line("DRO-V", "#c63"),
    "rpo": Line("RPO", "#2a7"),
    "dpo": Line("DPO", "#92c"),
}


def kl(out: Path, seeds: list[int]) -> str:
    """Reward and KL of the offline methods over training, in both forms."""
    panels = (
        ("eval/reward", "", "true reward"),
        ("eval/kl", "", "KL to the reference (nats)"),
        ("eval/reward", "_normalised", "true reward, length-normalised"),
        ("eval/kl", "_normalised", "KL, length-normalised"),
    )
    figure, axes = axes_of(4)
    for axis, (key, form, title) in zip(axes, panels, strict=True):
        for job, line in OFFLINE_LINES.items():
            draw(axis, [home(out, seed, job + form) for seed in seeds], key, line.label, line.colour)
        axis.set(xlabel="step", title=title)
        if key == "eval/kl":
            axis.set_yscale("symlog", linthresh=1)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(out / "offline.png", dpi=120)
    title = "true reward and KL of the offline methods over training, summed and length-normalised"
    note = "(Band: lowest to highest seed. The KL axes are linear up to 1.)"
    return f"![{title}](offline.png)\n\n{note}"


# --- all of them --------------------------------------------------------------------------------------------


class Table(NamedTuple):
    make: Callable[[Path, list[int]], str]
    """from the folder of all runs and the seeds, markdown"""
    jobs: list[str]
    """that it reads"""


OFFLINE_JOBS = [job + form for job in OFFLINE_LINES for form in ("", "_normalised")]

TABLES = {
    "policies": Table(policies, ["measured", *[name for name in POLICIES if name != "before"]]),
    "values": Table(values, ["judged"]),
    "authors": Table(authors, ["judged_in", "judged_out"]),
    "sizes": Table(sizes, list(SIZES)),
    "beta": Table(beta, ["dvpo", "dvpo_beta_005", "dvpo_beta_001"]),
    "curves": Table(curves, list(ONLINE)),
    "cost": Table(cost, []),  # its runs are timed apart, one at a time
    "offline": Table(offline, ["offline_sft_measured", *OFFLINE_JOBS]),
    "unseen": Table(unseen, ["measured_seen", "measured_unseen"]),
    "ablations": Table(ablations, [*ABLATIONS, "rpo_normalised", "offline_sft_measured"]),
    "kl": Table(kl, OFFLINE_JOBS),
}


def provenance(out: Path, seeds: list[int], name: str) -> str:
    """The line under a table: how to make it again, of which runs it is."""
    files = [home(out, seed, job) / "job.json" for seed in seeds for job in TABLES[name].jobs]
    if not files:  # the timed runs
        files = list(out.glob("seed*/timed*/job.json"))
    records = [json.loads(file.read_text()) for file in files]
    commits = sorted({record["commit"].rstrip("+") for record in records})
    dates = sorted({record["date"] for record in records})
    command = f"`python paper/tables.py --only {name}`"
    seed_list = ", ".join(map(str, seeds))
    over = f"rounds of seed {seeds[0]}" if name == "cost" else "seeds"
    return (
        f"({command}; seeds {seed_list}; commit {', '.join(commits)}; {dates[-1]}. "
        f"Mean ± standard deviation over {over}.)"
    )


def write(out: Path, seeds: list[int], names: list[str], docs: Path | None) -> None:
    """Each table to out/table-NAME.md; with `docs` also between its marks in the pages of docs/results/, and the
    pictures to `docs`."""
    for name in names:
        found = TABLES[name].make(out, seeds)
        found += f"\n\n{provenance(out, seeds, name)}\n"
        (out / f"table-{name}.md").write_text(found, encoding="utf-8")
        print(f"\n## {name}\n\n{found}", flush=True)
        if docs:
            put_between_marks(sorted((docs / "results").glob("*.md")), name, found)
    if docs:
        for picture in out.glob("*.png"):
            (docs / picture.name).write_bytes(picture.read_bytes())


def put_between_marks(pages: list[Path], name: str, table: str) -> None:
    """Replaces what stands between the marks of the table `name` in the page that has them; pictures lie one folder up."""
    first = f"<!-- table {name} -->\n"
    last = f"<!-- end {name} -->"
    table = re.sub(r"\]\((\w+\.png)\)", r"](../\1)", table)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if first in text:
            before, rest = text.split(first)
            _, after = rest.split(last, 1)
            page.write_text(before + first + table + last + after, encoding="utf-8")
