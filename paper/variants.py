"""DVPO compared with PPO on the embedded world, and the Global Value Model with the truth.

For each seed: a reward model, a GVM from its scores (the paper's comparison) and a GVM from +1 / -1, all from
one SFT policy; then PPO with the reward model, DVPO with either GVM, with `--centre` and with `--advantage
q`: same policy, prompts, batch and epochs. PPO with the true reward and DVPO with a GVM from true scores show
what is left when the reward model's errors are gone.

    python paper/variants.py                  # 5 seeds, about an hour on one core; resumes where it was stopped
    python paper/variants.py --seeds 0 1      # part of them; the table is over all that are finished

Also GVMs from the true scores with other settings. Writes runs/bench/table.md, curves.png, gvm.md, truth.png
and truth.json.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.data import hold_out, read_rows
from common.tables import markdown
from tools.jobs import ROOT


class Method(NamedTuple):
    """A policy of the table."""

    script: str
    flags: list[str]
    """with {} for the seed's folder"""
    colour: str | None
    """in the picture; None: not in it"""


METHODS = {
    "PPO, reward model": Method("ppo.py", ["--reward", "{}/reward/model"], "#444"),
    "DVPO, GVM from reward-model scores": Method("dvpo.py", ["--gvm", "{}/gvm_scores/model"], "#2a7"),
    "DVPO, GVM from +1/-1": Method("dvpo.py", ["--gvm", "{}/gvm_pairs/model"], "#27a"),
    "DVPO, GVM from +1/-1, --log-odds": Method(
        "dvpo.py", ["--gvm", "{}/gvm_pairs/model", "--log-odds"], "#0cc"
    ),
    "DVPO, GVM from +1/-1, --beta 0.05": Method(
        "dvpo.py", ["--gvm", "{}/gvm_pairs/model", "--beta", "0.05"], None
    ),
    "DVPO, GVM from scores, --centre": Method(
        "dvpo.py", ["--gvm", "{}/gvm_scores/model", "--centre"], "#92c"
    ),
    "DVPO, GVM from scores, --advantage q": Method(
        "dvpo.py", ["--gvm", "{}/gvm_scores/model", "--advantage", "q"], "#c63"
    ),
    "PPO, true reward": Method("ppo.py", ["--reward", "assets.reviews:reward"], None),
    "DVPO, GVM from true scores": Method("dvpo.py", ["--gvm", "{}/gvm_lam_0_95_default_/model"], None),
}
FIRST = "PPO, reward model"  # all others are compared with it
LAST = "DVPO, GVM from true scores"  # a seed that has it is finished

GVMS = {  # variants of the GVM from the true scores, for the table of accuracies
    "lam 0.95 (default)": [],
    "lam 0 (the paper's equation 1)": ["--lam", "0"],
    "lam 1 (Monte Carlo)": ["--lam", "1"],
    "--normalise-values (v1)": ["--normalise-values"],
    "--context-pairs 2 (v1)": ["--context-pairs", "2"],
}


# --- training -----------------------------------------------------------------------------------------------


def run(folder: Path, script: str, *flags: str) -> None:
    """One script, unless it has finished before. Ends all where it fails."""
    if (folder / "model/config.json").exists():
        return
    print("$", script, *flags, flush=True)
    command = [sys.executable, str(ROOT / script), "--run-dir", str(folder), "--overwrite"]
    command += ["--save-every", "0", *flags]
    with open(f"{folder}.log", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=log).returncode
    if code:
        sys.exit(f"error: {script} failed, see {folder}.log")


def slug(name: str) -> str:
    """The name of a folder."""
    return re.sub(r"\W+", "_", name).lower()


def train(out: Path, seed: int, steps: int) -> None:
    """All of a seed."""
    home = out / f"seed{seed}"
    home.mkdir(parents=True, exist_ok=True)
    common = ["--model", str(out / "sft/model"), "--seed", str(seed)]
    run(home / "reward", "reward.py", *common)
    run(home / "gvm_scores", "gvm_td.py", *common, "--reward", f"{home}/reward/model")
    run(home / "gvm_pairs", "gvm_td.py", *common, "--source", "preference")
    for name, flags in GVMS.items():
        run(home / f"gvm_{slug(name)}", "gvm_td.py", *common, *flags)
    for name, method in METHODS.items():
        flags = [flag.format(home) for flag in method.flags]
        run(home / slug(name), method.script, *common, *flags, "--steps", str(steps), "--eval-every", "3")


# --- the truth about prefixes -------------------------------------------------------------------------------


class Prefix(NamedTuple):
    """The beginning of a review. The empty one's value is V(s_1)."""

    prompt: str
    words: list[str]
    value: float
    """expected reward under the behaviour policy"""


def true_values(prompts: list[str], samples: int, least: int) -> list[Prefix]:
    """The values of prefixes by sampling the behaviour policy, a random author for each review: the mean
    reward of all reviews that begin so, for prefixes that at least `least` of them share."""
    from assets import reviews

    rng = random.Random(7)
    authors = list(reviews.AUTHORS)
    found = []
    for prompt in prompts:
        texts = [reviews.write(rng.choice(authors), prompt, rng) for _ in range(samples)]
        rewards = reviews.reward([prompt] * samples, texts)
        rewards_of = {}  # by prefix
        for text, reward in zip(texts, rewards, strict=True):
            words = text.split()
            for length in range(len(words) + 1):
                rewards_of.setdefault(tuple(words[:length]), []).append(reward)
        for words, rewards in rewards_of.items():
            if len(rewards) >= least:
                found.append(Prefix(prompt, list(words), statistics.fmean(rewards)))
    return found


def truth(folder: Path, prefixes: list[Prefix]) -> dict:
    """Correlation of a GVM's values with the true values of prefixes, and the mean absolute error by
    position."""
    import numpy as np

    true = np.array([prefix.value for prefix in prefixes])
    predicted = predicted_values(folder / "model", prefixes)
    position = np.array([len(prefix.words) for prefix in prefixes])
    error = {}
    count = {}
    for number in sorted(set(position)):
        there = position == number
        error[int(number)] = float(np.abs(predicted - true)[there].mean())
        count[int(number)] = int(there.sum())
    return {
        "correlation": float(np.corrcoef(predicted, true)[0, 1]),
        "error": error,
        "count": count,
        "spread": float(true.std()),
    }


def predicted_values(folder: Path, prefixes: list[Prefix]):
    """A GVM's value at the last token of each prefix, an array [N], in the unit of the reward."""
    import numpy as np
    import torch
    import transformers
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prefix in prefixes:
        texts.append(f"<bos> <user> {prefix.prompt} <writer> {' '.join(prefix.words)}".strip())
    values = []
    with torch.no_grad():
        for start in range(0, len(texts), 512):
            batch = tokenizer(
                texts[start : start + 512], padding=True, padding_side="right", return_tensors="pt"
            )
            mask = batch["attention_mask"]  # [B, L]
            last = mask.sum(1) - 1
            logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits.squeeze(-1)  # [B, L]
            values += logits[torch.arange(len(last)), last].tolist()
    # back from standardised scores
    return np.array(values) * model.config.return_std + model.config.return_mean


# --- the tables ---------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """The metrics of a run."""

    evaluations: list[dict]
    steps: list[dict]


def curve(folder: Path) -> Curve:
    """The metrics of a run, its evaluations apart from its steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval/reward" in row]
    steps = [row for row in rows if "time/step_s" in row]
    return Curve(evaluations, steps)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± standard deviation; of a single value ± 0."""
    values = list(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def seconds_of(run: Curve) -> float:
    """The median step."""
    return statistics.median(row["time/step_s"] for row in run.steps)


def at_the_end(runs: list[Curve], key: str) -> list[float]:
    """The mean of a metric over the last three evaluations, one per run."""
    return [statistics.fmean(row[key] for row in run.evaluations[-3:]) for run in runs]


def first_step_above(run: Curve, level: float) -> int | None:
    """The step of the first evaluation that has a reward of `level`."""
    for row in run.evaluations:
        if row["eval/reward"] >= level:
            return row["step"]
    return None


def steps_to_ppo(runs: list[Curve], ppo: list[Curve]) -> str:
    """The steps until a method has gained 80 % of what PPO gained at its best."""
    reached = []
    for run, ppo_run in zip(runs, ppo, strict=True):
        rewards = [row["eval/reward"] for row in ppo_run.evaluations]
        level = rewards[0] + 0.8 * (max(rewards) - rewards[0])
        step = first_step_above(run, level)
        if step is not None:
            reached.append(step)
    if not reached:
        return "never"
    if len(reached) < len(runs):
        return f"{spread(reached)} ({len(reached)} of {len(runs)} runs)"
    return spread(reached)


def report(out: Path, seeds: list[int]) -> None:
    """The methods: table.md and curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    head = ["", "reward at the end", "grammatical", "KL (nats)", "length", "steps to 80 % of PPO's best"]
    head += ["s a step / PPO's", "state MB"]
    rows = []
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    ppo = [curve(out / f"seed{seed}" / slug(FIRST)) for seed in seeds]
    for name, method in METHODS.items():
        runs = [curve(out / f"seed{seed}" / slug(name)) for seed in seeds]
        grammatical = [100 * share for share in at_the_end(runs, "eval/grammatical")]
        ratios = [seconds_of(run) / seconds_of(ppo_run) for run, ppo_run in zip(runs, ppo, strict=True)]
        state = runs[0].steps[-1]["memory/state_gb"] * 1024
        rows.append(
            [
                name,
                spread(at_the_end(runs, "eval/reward")),
                f"{spread(grammatical)} %",
                spread(at_the_end(runs, "eval/kl")),
                spread(at_the_end(runs, "eval/length")),
                steps_to_ppo(runs, ppo),
                spread(ratios),
                f"{state:.2f}",
            ]
        )
        if method.colour:
            draw(axes, runs, name, method.colour)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    axes[2].set_yscale("symlog", linthresh=10)
    figure.savefig(out / "curves.png", dpi=120)
    note = f"Seeds {seeds}; mean ± standard deviation over seeds of the mean of the last three evaluations."
    table = markdown(head, rows)
    (out / "table.md").write_text(table + "\n\n" + note + "\n")
    print(table)


def draw(axes, runs: list[Curve], name: str, colour: str) -> None:
    """A method's reward, grammar and KL: the mean over seeds, and a band from the lowest to the highest."""
    titles = {
        "eval/reward": "true reward, held-out prompts",
        "eval/grammatical": "share grammatical",
        "eval/kl": "KL (nats)",
    }
    steps = [row["step"] for row in runs[0].evaluations]
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        by_run = [[row[key] for row in run.evaluations] for run in runs]
        by_step = list(zip(*by_run, strict=True))
        lowest = [min(values) for values in by_step]
        highest = [max(values) for values in by_step]
        mean = [statistics.fmean(values) for values in by_step]
        axis.fill_between(steps, lowest, highest, color=colour, alpha=0.15, lw=0)
        axis.plot(steps, mean, color=colour, label=name, lw=1.8)
        axis.set(xlabel="step", title=title)
        axis.spines[["top", "right"]].set_visible(False)


def report_truth(out: Path, seeds: list[int], prefixes: list[Prefix]) -> None:
    """The GVMs: held-out pair accuracy, correlation with the true values of prefixes, error by position."""
    import matplotlib.pyplot as plt

    kinds = {"from reward-model scores": "gvm_scores", "from +1/-1": "gvm_pairs"}
    for name in GVMS:
        kinds[f"from true scores, {name}"] = f"gvm_{slug(name)}"
    drawn = ("gvm_scores", "gvm_lam_0_95_default_", "gvm_lam_0_the_paper_s_equation_1_")
    head = ["GVM", "pair accuracy, mean", "last token", "correlation with the truth"]
    head += ["error after 0 words", "4", "8"]
    columns = head.count("|") - 1
    rows = []
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    everything = {}
    for name, kind in kinds.items():
        folders = [out / f"seed{seed}/{kind}" for seed in seeds]
        pairs = [json.loads((folder / "accuracy.json").read_text()) for folder in folders]
        row = [name]
        row.append(spread([shares["mean"] for shares in pairs], 3))
        row.append(spread([shares["last"] for shares in pairs], 3))
        # the first reads more than a prefix, the second's unit is its own
        if "context" not in kind and "normalise" not in kind:
            found = [truth(folder, prefixes) for folder in folders]
            everything[kind] = found
            row.append(spread([measured["correlation"] for measured in found], 3))
            if kind != "gvm_pairs":  # +1 / -1 are not in the unit of the reward
                positions = list(found[0]["error"])
                error = {p: statistics.fmean(measured["error"][p] for measured in found) for p in positions}
                row += [f"{error[p]:.2f}" for p in (0, 4, 8)]
                if kind in drawn:
                    of_seeds = [[measured["error"][p] for measured in found] for p in positions]
                    (line,) = axis.plot(positions, error.values(), "o-", ms=3, label=name)
                    lowest, highest = map(min, of_seeds), map(max, of_seeds)
                    band = dict(color=line.get_color(), alpha=0.15, lw=0)
                    axis.fill_between(positions, list(lowest), list(highest), **band)
        row += ["-"] * (columns - len(row))
        rows.append(row)
    (out / "truth.json").write_text(json.dumps(everything, indent=1))

    deviation = everything["gvm_scores"][0]["spread"]
    axis.axhline(deviation, color="#bbb", lw=1, label="standard deviation of the true values")
    axis.set(xlabel="words of the response seen", ylabel="mean absolute error (reward)", ylim=(0, None))
    axis.set_title("GVM against the true value of a prefix")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "truth.png", dpi=120)
    table = markdown(head, rows)
    (out / "gvm.md").write_text(table + "\n")
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="all is done for each")
    parser.add_argument("--steps", type=int, default=30, help="of PPO and DVPO")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="all runs lie in it")
    parser.add_argument("--train-only", action="store_true", help="no table: for running seeds side by side")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.out.mkdir(parents=True, exist_ok=True)
    run(args.out / "sft", "sft.py")
    for seed in args.seeds:
        train(args.out, seed, args.steps)
    if args.train_only:
        return

    _, held_out = hold_out(read_rows("reviews", "prompts", part="value"), 0.2, 0)
    finished = []
    for seed in range(100):
        if (args.out / f"seed{seed}" / slug(LAST) / "model").exists():
            finished.append(seed)
    report(args.out, finished)
    prompts = [row["prompt"] for row in held_out[:24]]
    report_truth(args.out, finished, true_values(prompts, samples=8000, least=100))


if __name__ == "__main__":
    main()
