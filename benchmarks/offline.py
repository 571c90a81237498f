"""The offline algorithms on the embedded world: SFT, KTO, DRO-V, RPO and DPO from one SFT policy and one set of scored data.

The comparison of 2506.13702 and its ablations, for summed and for length-normalised log-probabilities. All read the same
responses: SFT as they are, RPO and DRO with their scores, KTO with the labels score > 0, DPO as pairs of neighbours.

    python benchmarks/offline.py                  # 5 seeds, about an hour on one core; resumes where it was stopped
    python benchmarks/offline.py --seeds 0 1 --train-only     # part of them, without the table

Writes runs/offline/table.md, ablations.md and offline.png.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

from reviews import curve, run, slug, spread

METHODS = {  # name: (script, flags, colour)
    "SFT": ("sft.py", ["--part", "value", "--lr", "1e-3"], "#999"),
    "KTO": ("kto.py", [], "#27a"),
    "DRO-V": ("dro.py", [], "#c63"),
    "RPO": ("rpo.py", [], "#2a7"),
    "DPO": ("dpo.py", [], "#92c"),
}
NORMALISED = "length-normalised"
ABLATIONS = {  # of RPO
    "tau 0.1": ["--tau", "0.1"],
    "tau 0.3 (the table above)": None,
    "tau 1": ["--tau", "1"],
    "no partition value": ["--no-partition"],
    "no partition value, length-normalised": ["--no-partition", "--length-normalise"],
    "50 % of the responses": ["--keep-responses", "0.5"],
    "25 %": ["--keep-responses", "0.25"],
    "noise 0.5": ["--reward-noise", "0.5"],
    "noise 1.0": ["--reward-noise", "1.0"],
}
COLUMNS = {"eval/reward": 2, "eval/grammatical": 0, "eval/kl": 2, "eval/distinct_2": 3, "eval/pair_accuracy": 3}


def train(out: Path, seed: int, steps: int, ablations: bool) -> None:
    home = out / f"seed{seed}"
    home.mkdir(parents=True, exist_ok=True)
    common = ["--model", str(out / "sft/model"), "--seed", str(seed), "--steps", str(steps), "--eval-every", "30"]
    for name, (script, flags, _) in METHODS.items():
        run(home / slug(name), script, *common, *flags)
        if script == "sft.py":  # it has no reference: rpo.py's first evaluation measures the same numbers of its result
            still = ["--model", str(home / "sft/model"), "--ref-model", str(out / "sft/model"), "--steps", "1", "--lr", "1e-12"]
            run(home / "sft_measured", "rpo.py", *still)
        if script != "sft.py":
            run(home / slug(f"{name} {NORMALISED}"), script, *common, *flags, "--length-normalise")
    for name, flags in ABLATIONS.items() if ablations else ():
        if flags:
            run(home / slug(f"RPO {name}"), "rpo.py", *common, *flags)


def row_of(label: str, folders: list[Path], timed: list[Path] | None = None) -> str:
    """One row of a table: last evaluation, mean and standard deviation over seeds; seconds of all training steps."""
    runs, cells = [curve(folder) for folder in folders], [label]
    for key, digits in COLUMNS.items():
        found = [evaluations[-1].get(key) for evaluations, _ in runs]
        scale = 100 if key == "eval/grammatical" else 1
        cells.append("-" if None in found else spread((scale * x for x in found), digits))
    seconds = [sum(r["time/step_s"] for r in steps) for _, steps in map(curve, timed or folders)]
    return "| " + " | ".join([*cells, spread(seconds, 0)]) + " |"


def report(out: Path, seeds: list[int], ablated: list[int]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    head = "| | true reward | grammatical, % | KL (nats) | distinct-2 | pair accuracy | seconds of training |\n|" + "---|" * 7
    lines = [head]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    titles = {"eval/reward": "true reward", "eval/grammatical": "share grammatical", "eval/kl": "KL to the reference (nats)"}
    for row, extra in zip(axes, ("", f" {NORMALISED}"), strict=True):
        for name, (script, _, colour) in METHODS.items():
            if script == "sft.py" and extra:
                continue
            folders = [out / f"seed{seed}" / slug(name + extra) for seed in seeds]
            measured = [folder.with_name("sft_measured") if script == "sft.py" else folder for folder in folders]
            lines.append(row_of(name + extra.replace(" ", ", ", 1), measured, folders))
            runs = [curve(folder)[0] for folder in folders]
            for axis, (key, title) in zip(row, titles.items(), strict=True):
                axis.set(title=title + extra.replace(" ", ", ", 1), xlabel="step")
                axis.spines[["top", "right"]].set_visible(False)
                if key not in runs[0][0]:
                    continue
                steps, series = [r["step"] for r in runs[0]], list(zip(*[[r[key] for r in one] for one in runs], strict=True))
                axis.fill_between(steps, [min(v) for v in series], [max(v) for v in series], color=colour, alpha=0.15, lw=0)
                axis.plot(steps, [statistics.fmean(v) for v in series], color=colour, label=name, lw=1.8)
        row[2].set_yscale("symlog", linthresh=1)
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    figure.savefig(out / "offline.png", dpi=120)
    note = f"\nSeeds {seeds}; last evaluation, mean ± standard deviation over seeds."
    (out / "table.md").write_text("\n".join(lines) + "\n" + note + "\n")
    print("\n".join(lines), note)
    lines = [head]
    for name, flags in ABLATIONS.items() if ablated else ():
        label = slug(f"RPO {name}") if flags else slug("RPO")
        lines.append(row_of(f"RPO, {name}", [out / f"seed{seed}" / label for seed in ablated]))
    (out / "ablations.md").write_text("\n".join(lines) + f"\n\nSeeds {ablated}.\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--ablation-seeds", type=int, nargs="*", default=list(range(3)))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/offline"))
    parser.add_argument("--train-only", action="store_true", help="no table: for running seeds side by side")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.out.mkdir(parents=True, exist_ok=True)
    run(args.out / "sft", "sft.py")
    for seed in args.seeds:
        train(args.out, seed, args.steps, seed in args.ablation_seeds)
    if not args.train_only:
        report(args.out, args.seeds, [seed for seed in args.seeds if seed in args.ablation_seeds])


if __name__ == "__main__":
    sys.exit(main())
