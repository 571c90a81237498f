"""Reward over KL on the embedded world: every method at several strengths, and who is ahead at equal KL.

    python paper/frontiers.py                            # seeds 0 1 2; resumes where it was stopped
    python paper/frontiers.py --seeds 3 4                # two more seeds, added to those that are there
    python paper/frontiers.py --seeds --docs docs        # no run: the report from what is there

A seed has its own SFT policy, its own split of the prompts (`--split-seed`) and its own order and samples. All
methods of a seed start from that policy. Each is measured by fresh samples, the same number to each of the same
96 held-out prompts, which no method trains on; its KL to the SFT policy is `eval/kl` of its last evaluation.
Offline methods learn from the true rewards (KTO: their sign, DPO: pairs ordered by them), online ones from the
true reward or from a value model that learned it.

The numbers go to docs/results/data/frontiers.json, and the report is made from that file alone: the tables of
docs/results/frontiers.md and docs/frontier.png.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.tables import markdown
from paper import report
from tools.jobs import ROOT, WarmJobs

DATA = ROOT / "docs/results/data/frontiers.json"
AGAINST = ("rpo_reference", "rpo_none", "ppo")  # that the others are compared with
KLS = (0.5, 1.0, 2.0, 4.0)  # nats at which methods are compared
TAUS = ("0.1", "0.2", "0.3", "0.5", "1", "5")
BETAS_OFFLINE = ("0.02", "0.05", "0.1", "0.2", "0.5", "1")
BETAS_ONLINE = ("0.02", "0.05", "0.1", "0.2", "0.5", "1", "2")
OFFLINE_STEPS = "150"
ONLINE_STEPS = "20"
SAMPLES = "4"  # to each held-out prompt


class Method(NamedTuple):
    """A line of the picture."""

    label: str
    command: list[str]
    flag: str
    """of the strength"""
    strengths: tuple[str, ...]
    colour: str


OFFLINE = ["--steps", OFFLINE_STEPS]
ONLINE = ["--steps", ONLINE_STEPS]
METHODS = {
    "rpo_reference": Method(
        "RPO, `reference`", ["rpo.py", "--partition", "reference", *OFFLINE], "--tau", TAUS, "#2a7"
    ),
    "rpo_sample": Method(
        "RPO, `sample`", ["rpo.py", "--partition", "sample", *OFFLINE], "--tau", TAUS, "#7b3"
    ),
    "rpo_self_normalised": Method(
        "RPO, `self-normalised`",
        ["rpo.py", "--partition", "self-normalised", *OFFLINE],
        "--tau",
        TAUS,
        "#0cc",
    ),
    "rpo_none": Method("RPO, `none`", ["rpo.py", "--partition", "none", *OFFLINE], "--tau", TAUS, "#163"),
    "dro": Method("DRO-V", ["dro.py", *OFFLINE], "--tau", TAUS, "#c63"),
    "kto": Method("KTO", ["kto.py", *OFFLINE], "--beta", BETAS_OFFLINE, "#27a"),
    "dpo": Method("DPO", ["dpo.py", *OFFLINE], "--beta", BETAS_OFFLINE, "#92c"),
    "ppo": Method("PPO", ["ppo.py", *ONLINE], "--beta", BETAS_ONLINE, "#444"),
    "dvpo": Method(
        "DVPO, GVM from true scores",
        ["dvpo.py", "--gvm", "{home}/gvm_true/model", *ONLINE],
        "--beta",
        BETAS_ONLINE,
        "#e4b",
    ),
    "dvpo_pairs": Method(
        "DVPO, GVM from +1/-1",
        ["dvpo.py", "--gvm", "{home}/gvm_pairs/model", *ONLINE],
        "--beta",
        BETAS_ONLINE,
        "#fa0",
    ),
    "grpo": Method("GRPO", ["grpo.py", *ONLINE], "--beta", BETAS_ONLINE, "#a22"),
    "remax": Method("ReMax", ["remax.py", *ONLINE], "--beta", BETAS_ONLINE, "#999"),
}


# --- the runs -----------------------------------------------------------------------------------------------


def job_name(method: str, strength: str) -> str:
    """The name of a run, and of its folder."""
    return f"{method}_{strength.replace('.', '_')}"


def commands() -> dict[str, list[str]]:
    """All jobs of a seed by name; tools/jobs.py says what the braces mean."""
    seeds = ["--seed", "{seed}", "--split-seed", "{seed}"]
    # One evaluation, at the end, whose KL is needed. The online scripts have none at all with --eval-every 0.
    short = ["--eval-every", "1000", "--save-every", "0", "--overwrite"]
    start = ["--model", "{home}/sft/model", *seeds, *short]
    jobs = {}
    jobs["sft"] = ["sft.py", *seeds, *short]
    jobs["gvm_true"] = ["gvm_td.py", *start, "--steps", "500"]
    jobs["gvm_pairs"] = ["gvm_td.py", *start, "--steps", "500", "--source", "preference"]
    rewards = ["--reward", "assets.reviews:reward", "assets.reviews:grammatical"]
    measure = ["evaluate.py", "responses", *seeds, *rewards, "--samples", SAMPLES, "--overwrite"]
    measure += ["--batch-size", "384"]
    jobs["measured_sft"] = [*measure, "--models", "{home}/sft/model", "--names", "sft"]
    for name, method in METHODS.items():
        names = []
        for strength in method.strengths:
            job = job_name(name, strength)
            jobs[job] = [*method.command, *start, method.flag, strength]
            names.append(job)
        paths = [f"{{home}}/{job}/model" for job in names]
        jobs[f"measured_{name}"] = [*measure, "--models", *paths, "--names", *names]
    return jobs


def collect(out: Path, seed: int, methods: list[str]) -> list[dict]:
    """The numbers of finished methods of a seed, a row per policy; the SFT policy has no strength. `start` is the
    reward of the SFT policy that this one began as."""
    sft = row_of(out, seed, "sft", "sft", None, 0.0)
    rows = [sft]
    for name in methods:
        for strength in METHODS[name].strengths:
            job = job_name(name, strength)
            kl = report.final(out, seed, job, "eval/kl")
            row = row_of(out, seed, job, name, float(strength), kl)
            # Another day, or another machine, may train a slightly different SFT policy from the same seed.
            rows.append(row | {"start": sft["reward"]})
    return rows


def row_of(out: Path, seed: int, job: str, method: str, strength: float | None, kl: float) -> dict:
    """What is kept of a policy."""
    summary = json.loads((out / f"seed{seed}" / f"measured_{method}" / "responses.json").read_text())
    found = summary["models"][job]
    return {
        "seed": seed,
        "method": method,
        "strength": strength,
        "reward": round(found["reward"]["mean"], 4),
        "kl": round(kl, 4),
        "grammatical": round(found["grammatical"]["mean"], 4),
        "length": round(found["length"]["mean"], 2),
    }


def merge(old: list[dict], new: list[dict]) -> list[dict]:
    """All rows, the new ones in place of old ones of the same method and seed, in the order of the seeds."""
    measured = {(row["seed"], row["method"]) for row in new}
    rows = [row for row in old if (row["seed"], row["method"]) not in measured] + new
    return sorted(rows, key=lambda row: row["seed"])


def write_data(file: Path, rows: list[dict]) -> None:
    """A JSON list with a row per line."""
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


# --- at equal KL --------------------------------------------------------------------------------------------


def frontier(rows: list[dict], seed: int, method: str) -> list[tuple[float, float]]:
    """(KL, reward) of a method's strengths in one seed from its SFT policy on, in the order of the KL; empty where
    it was not measured."""
    found = [row for row in rows if row["seed"] == seed and row["method"] == method]
    starts = {(0.0, row["start"]) for row in found}
    return sorted([*starts, *((row["kl"], row["reward"]) for row in found)])


def reward_at(points: list[tuple[float, float]], kl: float) -> float | None:
    """The reward at a KL, on the straight line between the points on both sides; None beyond the last."""
    for (low, low_reward), (high, high_reward) in itertools.pairwise(points):
        if low <= kl <= high and low < high:
            share = (kl - low) / (high - low)
            return low_reward + share * (high_reward - low_reward)
    return None


def differences(rows: list[dict], ours: str, theirs: str, kl: float) -> list[float]:
    """Reward of one method minus another's at the same KL, for each seed in which both reach it."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        our_reward = reward_at(frontier(rows, seed, ours), kl)
        their_reward = reward_at(frontier(rows, seed, theirs), kl)
        if our_reward is not None and their_reward is not None:
            found.append(our_reward - their_reward)
    return found


def word(found: list[float], seeds: int) -> str:
    """ahead, behind or not separated, by the 95 % interval of paired differences, with that interval."""
    if not found:
        return "not reached"
    if len(found) == 1:
        return f"{found[0]:+.2f}, 1 of {seeds} seeds: no interval"
    mean = statistics.fmean(found)
    half = report.half_interval(found)
    if mean - half > 0:
        said = "**ahead**"
    elif mean + half < 0:
        said = "**behind**"
    else:
        said = "not separated"
    count = "" if len(found) == seeds else f", {len(found)} of {seeds} seeds"
    return f"{said}: {mean:+.2f} ± {half:.2f}{count}"


# --- the report ---------------------------------------------------------------------------------------------


def table_of_runs(rows: list[dict]) -> str:
    """Every method and strength: mean ± standard deviation over seeds."""
    lines = []
    of_sft = [row for row in rows if row["method"] == "sft"]
    lines.append(["SFT", "-", *cells(of_sft)])
    for name, method in METHODS.items():
        for strength in method.strengths:
            found = [row for row in rows if row["method"] == name and row["strength"] == float(strength)]
            if found:
                label = f"{method.flag.removeprefix('--')} {strength}"
                if method.strengths == TAUS and strength == "1":
                    label = f"**{label}, the paper's**"
                lines.append([method.label, label, *cells(found)])
    return markdown(
        ["method", "strength", "true reward", "KL (nats)", "grammatical, %", "length", "seeds"], lines
    )


def cells(found: list[dict]) -> list[str]:
    """The numbers of one setting, over seeds."""
    rewards = [row["reward"] for row in found]
    kls = [row["kl"] for row in found]
    grammatical = [100 * row["grammatical"] for row in found]
    lengths = [row["length"] for row in found]
    return [
        report.spread(rewards),
        report.spread(kls),
        report.spread(grammatical, 0),
        report.spread(lengths, 1),
        str(len(found)),
    ]


def table_of_verdicts(rows: list[dict], against: str) -> str:
    """Every method compared with `against` at equal KL."""
    seeds = len({row["seed"] for row in rows})
    measured = {row["method"] for row in rows}
    label = METHODS[against].label
    lines = []
    for name, method in METHODS.items():
        if name != against and name in measured:
            line = [method.label]
            for kl in KLS:
                line.append(word(differences(rows, name, against, kl), seeds))
            lines.append(line)
    head = [f"compared with {label}", *[f"KL {kl:g}" for kl in KLS]]
    return markdown(head, lines)


def verdicts(rows: list[dict]) -> str:
    """The tables of verdicts, one for each method that is compared with."""
    measured = {row["method"] for row in rows}
    tables = [table_of_verdicts(rows, against) for against in AGAINST if against in measured]
    return "\n\n".join(tables)


def draw(rows: list[dict], file: Path) -> None:
    """Reward over KL: a line per method through the means over seeds in the order of its strengths, with bars of
    one standard deviation. RPO without a partition value is in both panels."""
    measured = {row["method"] for row in rows}
    figure, axes = report.axes_of(2, 4.4)
    axes[0].set_title("offline")
    axes[1].set_title("online")
    for name, method in METHODS.items():
        online = method.strengths == BETAS_ONLINE
        if name in measured and (not online or name == "rpo_none"):
            draw_line(axes[0], rows, name, method)
        if name in measured and (online or name == "rpo_none"):
            draw_line(axes[1], rows, name, method)
    if not any(METHODS[name].strengths == BETAS_ONLINE for name in measured & {*METHODS}):
        axes[1].set_visible(False)
    for axis in axes:
        axis.set_xscale("symlog", linthresh=0.5)
        axis.set_xticks([0, *KLS, 8, 16], [f"{kl:g}" for kl in (0, *KLS, 8, 16)])
        axis.minorticks_off()
        axis.set(xlabel="KL to the SFT policy (nats)", ylabel="true reward, held-out prompts")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120, bbox_inches="tight")


def draw_line(axis, rows: list[dict], name: str, method: Method) -> None:
    """One method's line."""
    points = []  # (mean KL, mean reward, deviations of both)
    for strength in method.strengths:
        found = [row for row in rows if row["method"] == name and row["strength"] == float(strength)]
        if found:
            kls = [row["kl"] for row in found]
            rewards = [row["reward"] for row in found]
            spread_kl = statistics.stdev(kls) if len(found) > 1 else 0.0
            spread_reward = statistics.stdev(rewards) if len(found) > 1 else 0.0
            points.append((statistics.fmean(kls), statistics.fmean(rewards), spread_kl, spread_reward))
    kls, rewards, spread_kls, spread_rewards = zip(*points, strict=True)
    label = method.label.replace("`", "")
    axis.errorbar(
        kls,
        rewards,
        xerr=spread_kls,
        yerr=spread_rewards,
        fmt="o-",
        ms=3,
        lw=1.5,
        elinewidth=0.7,
        color=method.colour,
        label=label,
    )


def write_report(rows: list[dict], docs: Path) -> None:
    """The tables into the pages of docs/results/ and the picture."""
    seeds = sorted({row["seed"] for row in rows})
    pages = sorted((docs / "results").glob("*.md"))
    note = f"(`python paper/frontiers.py`; seeds {', '.join(map(str, seeds))}.)"
    report.put_between_marks(pages, "frontier_verdicts", f"{verdicts(rows)}\n\n{note}\n")
    report.put_between_marks(pages, "frontiers", f"{table_of_runs(rows)}\n\n{note}\n")
    draw(rows, docs / "frontier.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: the report alone")
    parser.add_argument("--only", nargs="+", choices=[*METHODS], default=[*METHODS], help="these methods")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/frontiers"))
    parser.add_argument("--data", type=Path, default=DATA, help="file of the numbers, which is added to")
    parser.add_argument("--docs", type=Path, help="folder of the pages and the picture")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    rows = json.loads(args.data.read_text()) if args.data.exists() else []
    for seed in args.seeds:  # one after the other: a seed counts when it is measured
        wanted = [(seed, f"measured_{name}") for name in ("sft", *args.only)]
        WarmJobs(args.out, commands(), wanted, set()).run(args.workers)
        rows = merge(rows, collect(args.out, seed, args.only))
        write_data(args.data, rows)
    if args.docs:
        write_report(rows, args.docs)
    print(table_of_runs(rows) + "\n\n" + verdicts(rows))


if __name__ == "__main__":
    main()
