"""DVPO beside PPO on the embedded world, and the Global Value Model beside the truth.

For each seed: a reward model, a GVM from its scores (the paper's comparison) and a GVM from +1 / -1, all from one SFT policy;
then PPO with the reward model, DVPO with either GVM, with `--centre` and with `--advantage q`: same policy, prompts, batch and
epochs. PPO with the true reward and DVPO with a GVM from true scores show what is left when the reward model's errors are gone.

    python paper/variants.py                   # 5 seeds, about an hour on one core; resumes where it was stopped
    python paper/variants.py --seeds 0 1 --out runs/bench   # part of them; the table is over all that are finished

Also GVMs from the true scores with other settings. Writes runs/bench/table.md, curves.png, gvm.md, truth.png and truth.json.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

from common.data import hold_out, read_rows

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
METHODS = {  # name: (script, flags with {} for the seed's folder, colour in the picture)
    "PPO, reward model": ("ppo.py", ["--reward", "{}/reward/model"], "#444"),
    "DVPO, GVM from reward-model scores": ("dvpo.py", ["--gvm", "{}/gvm_scores/model"], "#2a7"),
    "DVPO, GVM from +1/-1": ("dvpo.py", ["--gvm", "{}/gvm_pairs/model"], "#27a"),
    "DVPO, GVM from +1/-1, --log-odds": ("dvpo.py", ["--gvm", "{}/gvm_pairs/model", "--log-odds"], "#0cc"),
    "DVPO, GVM from +1/-1, --beta 0.05": ("dvpo.py", ["--gvm", "{}/gvm_pairs/model", "--beta", "0.05"], None),
    "DVPO, GVM from scores, --centre": ("dvpo.py", ["--gvm", "{}/gvm_scores/model", "--centre"], "#92c"),
    "DVPO, GVM from scores, --advantage q": (
        "dvpo.py",
        ["--gvm", "{}/gvm_scores/model", "--advantage", "q"],
        "#c63",
    ),
    "PPO, true reward": ("ppo.py", ["--reward", "assets.reviews:reward"], None),
    "DVPO, GVM from true scores": ("dvpo.py", ["--gvm", "{}/gvm_lam_0_95_default_/model"], None),
}

GVMS = {  # variants of the GVM from the true scores, for the table of accuracies
    "lam 0.95 (default)": [],
    "lam 0 (the paper's equation 1)": ["--lam", "0"],
    "lam 1 (Monte Carlo)": ["--lam", "1"],
    "--normalise-values (v1)": ["--normalise-values"],
    "--context-pairs 2 (v1)": ["--context-pairs", "2"],
}


def run(folder: Path, script: str, *flags: str) -> Path:
    """One script, unless it has finished before."""
    if not (folder / "model/config.json").exists():
        print("$", script, *flags, flush=True)
        command = [
            sys.executable,
            str(ROOT / script),
            "--run-dir",
            str(folder),
            "--overwrite",
            "--save-every",
            "0",
            *flags,
        ]
        with open(f"{folder}.log", "w") as log:
            if subprocess.run(command, stdout=log, stderr=log).returncode:
                sys.exit(f"error: {script} failed, see {folder}.log")
    return folder


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name).lower()


def train(out: Path, seed: int, steps: int) -> None:
    home, sft = out / f"seed{seed}", str(out / "sft/model")
    home.mkdir(parents=True, exist_ok=True)
    common = ["--model", sft, "--seed", str(seed)]
    run(home / "reward", "reward.py", *common)
    run(home / "gvm_scores", "gvm_td.py", *common, "--reward", f"{home}/reward/model")
    run(home / "gvm_pairs", "gvm_td.py", *common, "--source", "preference")
    for name, flags in GVMS.items():
        run(home / f"gvm_{slug(name)}", "gvm_td.py", *common, *flags)
    for name, (script, flags, _) in METHODS.items():
        flags = [flag.format(home) for flag in flags]
        run(home / slug(name), script, *common, *flags, "--steps", str(steps), "--eval-every", "3")


def true_values(prompts: list[str], samples: int, least: int) -> list[tuple[str, list[str], float]]:
    """(prompt, prefix words, expected reward) by sampling the behaviour policy, a random author for each review: the mean
    reward of all reviews that begin so, for prefixes at least `least` of them share. The empty prefix is V(s_1)."""
    from assets import reviews

    rng, found = random.Random(7), []
    for prompt in prompts:
        texts = [reviews.write(rng.choice(list(reviews.AUTHORS)), prompt, rng) for _ in range(samples)]
        seen = {}
        for text, score in zip(texts, reviews.reward([prompt] * samples, texts), strict=True):
            words = text.split()
            for length in range(len(words) + 1):
                seen.setdefault(tuple(words[:length]), []).append(score)
        found += [
            (prompt, list(words), statistics.fmean(scores))
            for words, scores in seen.items()
            if len(scores) >= least
        ]
    return found


def truth(folder: Path, prefixes) -> dict:
    """Correlation of a GVM's values with the true values of prefixes, and the mean absolute error by position."""
    import numpy as np
    import torch
    import transformers
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForTokenClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [f"<bos> <user> {prompt} <writer> {' '.join(words)}".strip() for prompt, words, _ in prefixes]
    values = []
    with torch.no_grad():
        for i in range(0, len(texts), 512):
            batch = tokenizer(texts[i : i + 512], padding=True, padding_side="right", return_tensors="pt")
            last = batch["attention_mask"].sum(1) - 1
            out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(
                -1
            )
            values += out[torch.arange(len(last)), last].tolist()
    config, true = model.config, np.array([value for *_, value in prefixes])
    values = np.array(values) * config.return_std + config.return_mean  # back from standardised scores
    position = np.array([len(words) for _, words, _ in prefixes])
    error = {int(p): float(np.abs(values - true)[position == p].mean()) for p in sorted(set(position))}
    count = {int(p): int((position == p).sum()) for p in sorted(set(position))}
    return {
        "correlation": float(np.corrcoef(values, true)[0, 1]),
        "error": error,
        "count": count,
        "spread": float(true.std()),
    }


def curve(folder: Path) -> tuple[list[dict], list[dict]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "eval/reward" in r], [r for r in rows if "time/step_s" in r]


def spread(values, digits: int = 2) -> str:
    values = list(values)
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values) if len(values) > 1 else 0:.{digits}f}"


def report(out: Path, seeds: list[int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [
        "| | reward at the end | grammatical | KL (nats) | length | steps to 80 % of PPO's best | s a step / PPO's | state MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    ppo = {seed: curve(out / f"seed{seed}" / slug("PPO, reward model")) for seed in seeds}
    seconds = {seed: statistics.median(r["time/step_s"] for r in ppo[seed][1]) for seed in seeds}
    for name, (_, _, colour) in METHODS.items():
        runs = {seed: curve(out / f"seed{seed}" / slug(name)) for seed in seeds}
        last = [
            [statistics.fmean(r[key] for r in runs[s][0][-3:]) for s in seeds]
            for key in ("eval/reward", "eval/grammatical", "eval/kl", "eval/length")
        ]
        reach = []
        for seed in seeds:
            start, best = ppo[seed][0][0]["eval/reward"], max(r["eval/reward"] for r in ppo[seed][0])
            level = start + 0.8 * (best - start)
            reach.append(next((r["step"] for r in runs[seed][0] if r["eval/reward"] >= level), None))
        reached = [r for r in reach if r is not None]
        when = spread(reached) if reached else "never"
        when += f" ({len(reached)} of {len(seeds)} runs)" if 0 < len(reached) < len(seeds) else ""
        ratio = spread(statistics.median(r["time/step_s"] for r in runs[s][1]) / seconds[s] for s in seeds)
        state = runs[seeds[0]][1][-1]["memory/state_gb"] * 1024
        grammar = spread(100 * x for x in last[1])
        cells = (
            name,
            spread(last[0]),
            f"{grammar} %",
            spread(last[2]),
            spread(last[3]),
            when,
            ratio,
            f"{state:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
        if not colour:
            continue
        titles = {
            "eval/reward": "true reward, held-out prompts",
            "eval/grammatical": "share grammatical",
            "eval/kl": "KL (nats)",
        }
        for axis, (key, title) in zip(axes, titles.items(), strict=True):
            steps = [r["step"] for r in runs[seeds[0]][0]]
            series = list(zip(*[[r[key] for r in runs[s][0]] for s in seeds], strict=True))
            axis.fill_between(
                steps, [min(v) for v in series], [max(v) for v in series], color=colour, alpha=0.15, lw=0
            )
            axis.plot(steps, [statistics.fmean(v) for v in series], color=colour, label=name, lw=1.8)
            axis.set(xlabel="step", title=title)
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower center", ncols=3
    )
    axes[2].set_yscale("symlog", linthresh=10)
    figure.savefig(out / "curves.png", dpi=120)
    note = f"Seeds {seeds}; mean ± standard deviation over seeds of the mean of the last three evaluations."
    (out / "table.md").write_text("\n".join(lines) + "\n\n" + note + "\n")
    print("\n".join(lines))


def report_truth(out: Path, seeds: list[int], prefixes) -> None:
    """The GVMs: held-out pair accuracy, correlation with the true values of prefixes, error by position."""
    import matplotlib.pyplot as plt

    kinds = {"from reward-model scores": "gvm_scores", "from +1/-1": "gvm_pairs"}
    kinds |= {f"from true scores, {name}": f"gvm_{slug(name)}" for name in GVMS}
    lines = [
        "| GVM | pair accuracy, mean | last token | correlation with the truth | error after 0 words | 4 | 8 |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    everything = {}
    for name, kind in kinds.items():
        folders = [out / f"seed{s}/{kind}" for s in seeds]
        pairs = [json.loads((folder / "accuracy.json").read_text()) for folder in folders]
        cells = [name, *(spread((p[key] for p in pairs), 3) for key in ("mean", "last"))]
        if (
            "context" not in kind and "normalise" not in kind
        ):  # the first reads more than a prefix, the second's unit is its own
            everything[kind] = found = [truth(folder, prefixes) for folder in folders]
            cells.append(spread((f["correlation"] for f in found), 3))
            if kind != "gvm_pairs":  # +1 / -1 are not in the unit of the reward
                positions = list(found[0]["error"])
                error = {p: statistics.fmean(f["error"][p] for f in found) for p in positions}
                cells += [f"{error[p]:.2f}" for p in (0, 4, 8)]
                if kind in ("gvm_scores", "gvm_lam_0_95_default_", "gvm_lam_0_the_paper_s_equation_1_"):
                    axis.plot(positions, error.values(), "o-", ms=3, label=name)
        lines.append("| " + " | ".join(cells + ["-"] * (7 - len(cells))) + " |")
    (out / "truth.json").write_text(json.dumps(everything, indent=1))
    axis.axhline(
        everything["gvm_scores"][0]["spread"],
        color="#bbb",
        lw=1,
        label="standard deviation of the true values",
    )
    axis.set(xlabel="words of the response seen", ylabel="mean absolute error (reward)", ylim=(0, None))
    axis.set_title("GVM against the true value of a prefix")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "truth.png", dpi=120)
    (out / "gvm.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--train-only", action="store_true", help="no table: for running seeds side by side")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.out.mkdir(parents=True, exist_ok=True)
    run(args.out / "sft", "sft.py")
    for seed in args.seeds:
        train(args.out, seed, args.steps)
    if args.train_only:
        return

    rows = hold_out(read_rows("reviews", "prompts", part="value"), 0.2, 0)[1]
    last = slug(list(METHODS)[-1])
    done = [s for s in range(100) if (args.out / f"seed{s}" / last / "model").exists()]
    report(args.out, done)
    report_truth(args.out, done, true_values([row["prompt"] for row in rows[:24]], 8000, 100))


if __name__ == "__main__":
    main()
