"""PPO, DVPO, GRPO and ReMax on the embedded world from one SFT policy, one reward model and one set of prompts: the true reward
against steps and against seconds.

    python benchmarks/reviews.py                # first: it trains them all
    python benchmarks/online.py                 # then: paired step times, the table and the picture, about 5 minutes

Seconds are steps times the median step time of short runs made in turn, one after the other, on the same machine.
Writes runs/bench/online.md, online.png and the timed runs below runs/bench/timed.
"""

import argparse
import json
import statistics
from pathlib import Path

from reviews import METHODS, curve, run, slug, spread

SHOWN = {  # name in METHODS: colour
    "PPO, reward model": "#444",
    "DVPO, GVM from reward-model scores": "#2a7",
    "GRPO, reward model": "#27a",
    "ReMax, reward model": "#c63",
}


def step_seconds(out: Path, seeds: list[int], repeats: int) -> dict[str, list[float]]:
    """Median seconds of a step of each method, for each of `repeats` rounds of short runs."""
    found = {name: [] for name in SHOWN}
    for repeat in range(repeats):
        for name in SHOWN:
            script, flags, _ = METHODS[name]
            flags = [flag.format(out / f"seed{seeds[0]}") for flag in flags]
            folder = out / f"timed/{repeat}-{slug(name)}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            run(folder, script, "--model", str(out / "sft/model"), *flags, "--steps", "6", "--eval-every", "0")
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            found[name].append(statistics.median(row["time/step_s"] for row in rows[1:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seconds, ppo = step_seconds(args.out, args.seeds, args.repeats), "PPO, reward model"
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    lines = ["| | true reward at the end | grammatical, % | KL (nats) | length | s a step / PPO's |", "|---|---|---|---|---|---|"]
    for name, colour in SHOWN.items():
        runs = [curve(args.out / f"seed{seed}" / slug(name))[0] for seed in args.seeds]
        cells = [
            spread(scale * statistics.fmean(row[key] for row in rows[-3:]) for rows in runs)
            for key, scale in (("eval/reward", 1), ("eval/grammatical", 100), ("eval/kl", 1), ("eval/length", 1))
        ]
        ratio = spread(a / b for a, b in zip(seconds[name], seconds[ppo], strict=True))
        lines.append("| " + " | ".join([name, *cells, ratio]) + " |")
        steps, of_ppo = [row["step"] for row in runs[0]], statistics.median(seconds[name]) / statistics.median(seconds[ppo])
        panels = (
            (steps, "eval/reward", "step"),
            ([step * of_ppo for step in steps], "eval/reward", "time, in steps of PPO"),
            (steps, "eval/grammatical", "step"),
        )
        for axis, (x, key, label) in zip(axes, panels, strict=True):
            series = list(zip(*[[row[key] for row in rows] for rows in runs], strict=True))
            axis.fill_between(x, [min(v) for v in series], [max(v) for v in series], color=colour, alpha=0.15, lw=0)
            axis.plot(x, [statistics.fmean(v) for v in series], color=colour, label=name, lw=1.8)
            axis.set(xlabel=label, title="true reward" if key == "eval/reward" else "share grammatical")
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(args.out / "online.png", dpi=120)
    note = f"\nSeeds {args.seeds}; mean ± standard deviation over seeds of the mean of the last three evaluations."
    (args.out / "online.md").write_text("\n".join(lines) + "\n" + note + "\n")
    print("\n".join(lines), note)


if __name__ == "__main__":
    main()
