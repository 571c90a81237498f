"""What a step of our RL scripts costs as the work grows: `python benchmarks/speed.py --scaling`.

grpo.py, dvpo.py and ppo.py as they are, on random models, one thing varied at a time around one base: response length, batch,
group size, vocabulary, model size. Each point has its arithmetic beside it (`flops`, `megabytes`): what a step must compute and
hold. Overheads make small work relatively dear, so measured cost may grow slower than the formula; where it grows faster
between two neighbouring points, by more than the tolerance, something does needless work, and the table says so.
"""

import json
import statistics
import sys
from pathlib import Path

NAMES = ("grpo", "dvpo", "ppo")
BASE = dict(width=128, layers=4, vocab=4096, batch=16, group=4, prompt=32, response=128, micro=4)
SWEEPS = {
    "response length": [dict(response=n) for n in (64, 128, 256, 512, 1024)],
    "batch": [dict(batch=n) for n in (8, 16, 32, 64)],
    "group size": [dict(group=n) for n in (2, 4, 8, 16)],
    "vocabulary": [dict(vocab=n) for n in (1024, 4096, 16384, 65536, 131072)],
    "model size": [dict(width=w, layers=n) for w, n in ((64, 2), (128, 4), (256, 6), (512, 8))],
}
TOLERANCE = 1.25  # of one growth over the other; times on one machine differ by that much


def trunk(at: dict) -> int:
    """Weights of the transformer blocks: 4 width^2 of attention and 3 width * inner of the MLP, a layer."""
    return at["layers"] * (4 * at["width"] ** 2 + 3 * at["width"] * inner(at))


def inner(at: dict) -> int:
    return 8 * at["width"] // 3 // 8 * 8


def flops(name: str, at: dict, epochs: int) -> float:
    """Of one step, with N weights in the trunk, L = prompt + response tokens, R of them the response's, B sequences.

    A forward pass of the trunk: B (2 N L + 2 layers width L^2); of the output layer: B R 2 width vocab. A backward pass is twice
    that; the output layer is computed anew in it. Sampling with a cache is one forward pass, scoring one of the reference, one of
    the policy where it is updated more than once, and one of the trunk for each of the critic or GVM and the reward model. Group
    size is no term.
    """
    length = at["prompt"] + at["response"]
    body = at["batch"] * (2 * trunk(at) * length + 2 * at["layers"] * at["width"] * length**2)
    head = at["batch"] * at["response"] * 2 * at["width"] * at["vocab"]
    others = {"grpo": 0, "dvpo": 1, "ppo": 2 + 3 * epochs}[name]
    return (2 + (epochs > 1)) * (body + head) + epochs * (3 * body + 4 * head) + others * body


def megabytes(name: str, at: dict) -> float:
    """Held at the peak in float32: trained weights four times (gradient, two moments), frozen ones once; and the greater of

    - the rollout: keys and values of all sequences, and of their next tokens five arrays of the vocabulary in float64;
    - the update: of a micro-batch some 16 arrays of the width and 4 of the MLP's a layer, and four chunks of 512 rows of logits.
    """
    length, layers = at["prompt"] + at["response"], at["layers"]
    embeddings = at["vocab"] * at["width"]
    policy, valued = trunk(at) + 2 * embeddings, trunk(at) + embeddings
    state = 4 * (5 * policy + {"grpo": 0, "dvpo": valued, "ppo": 5 * valued}[name])
    rollout = at["batch"] * (length * 2 * at["width"] * layers * 4 + 5 * 8 * at["vocab"])
    rows = at["micro"] * length
    update = (
        4 * rows * layers * (16 * at["width"] + 4 * inner(at))
        + 4 * 4 * min(512, at["micro"] * at["response"]) * at["vocab"]
    )
    return (state + max(rollout, update)) / 2**20


def too_fast(measured: list[float], formula: list[float], tolerance: float = TOLERANCE) -> list[int]:
    """The points i to which `measured` grew by more than `tolerance` times what `formula` did, from the point before."""
    pairs = range(1, len(measured))
    return [i for i in pairs if measured[i] / measured[i - 1] > tolerance * formula[i] / formula[i - 1]]


def point(name: str, at: dict, args, speed) -> dict:
    """Seconds of a step, its peak memory in MB, and the two formulas."""
    epochs = 1 if name == "grpo" else 4
    shape = dict(
        vocab_size=at["vocab"],
        hidden_size=at["width"],
        intermediate_size=inner(at),
        num_hidden_layers=at["layers"],
    )
    shape["num_attention_heads"] = max(2, at["width"] // 64)
    models = Path(args.out, f"scaling/model-{at['width']}-{at['layers']}-{at['vocab']}").absolute()
    models.mkdir(parents=True, exist_ok=True)
    paths = speed.make_models(models, shape, 8)
    size = dict(
        prompt=at["prompt"], response=at["response"], batch=at["batch"], micro=at["micro"], epochs=epochs
    )
    size |= dict(group=at["group"]) if name == "grpo" else {}
    steps, key = args.steps + 1, "-".join(str(v) for v in at.values())
    stem = Path(args.out, f"scaling/{name}-{key}").absolute()
    rows = speed.make_rows(name, size, steps, at["vocab"], 8)
    for row in rows:  # all of one length: what is varied is varied alone
        words = row["prompt"].split() * at["prompt"]
        row["prompt"] = " ".join(words[: at["prompt"] - 1])
    Path(f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = speed.our_arguments(name, paths, dict(ours=f"{stem}.jsonl"), size, steps, stem)
    spec = dict(
        side="ours",
        device=args.device,
        out=f"{stem}.json",
        run_dir=str(stem),
        script=name,
        arguments=arguments,
    )
    record = speed.run_side(sys.executable, spec, Path(f"{stem}.log"))
    if "error" in record:
        sys.exit(f"error: {record['error']}")
    ends = [step["at"] for step in record["steps"]]
    seconds = statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))
    formulas = dict(gflops=flops(name, at, epochs) / 1e9, formula_mb=megabytes(name, at))
    return dict(seconds=seconds, peak_mb=record["peak_mb"], **formulas)


def table(found: dict) -> str:
    """Markdown; `found`: {(sweep, name): [(label, point)]}."""
    lines = [
        "| | | s a step | GFLOP of the formula | peak MB | MB of the formula | grows faster |",
        "|" + "---|" * 7,
    ]
    for (sweep, name), points in found.items():
        each = lambda key: [p[key] for _, p in points]
        fast = {
            "time": too_fast(each("seconds"), each("gflops")),
            "memory": too_fast(each("peak_mb"), each("formula_mb")),
        }
        for i, (label, p) in enumerate(points):
            why = ", ".join(key for key, where in fast.items() if i in where)
            cells = [
                f"{sweep} {label}",
                name,
                f"{p['seconds']:.3g}",
                f"{p['gflops']:.3g}",
                f"{p['peak_mb']:,.0f}",
            ]
            lines.append("| " + " | ".join([*cells, f"{p['formula_mb']:,.0f}", why]) + " |")
    return "\n".join(lines)


def draw(found: dict, path: str) -> None:
    """Measured points, and dashed what the formula makes of the first one: a curve above its dashes grows faster."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sweeps = list(dict.fromkeys(sweep for sweep, _ in found))
    figure, axes = plt.subplots(2, len(sweeps), figsize=(3.2 * len(sweeps), 6), squeeze=False, sharey="row")
    for column, sweep in enumerate(sweeps):
        for row, (key, formula, unit) in enumerate(
            (("seconds", "gflops", "s a step"), ("peak_mb", "formula_mb", "peak MB"))
        ):
            ax = axes[row][column]
            for i, (name, points) in enumerate((n, p) for (s, n), p in found.items() if s == sweep):
                x, first = [label for label, _ in points], points[0][1]
                ax.plot(x, [p[key] for _, p in points], "o-", color=f"C{i}", label=name)
                ax.plot(
                    x,
                    [first[key] * p[formula] / first[formula] for _, p in points],
                    "--",
                    color=f"C{i}",
                    linewidth=1,
                )
            ax.set(xscale="log", yscale="log", xlabel=sweep, ylabel=unit if not column else "")
            name_of = lambda n: f"{n / 1e6:.2g}M" if n >= 1e6 else f"{n / 1e3:.0f}k" if n >= 1e4 else str(n)
            ax.set_xticks(x, [name_of(n) for n in x])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args, speed) -> None:
    found, known = {}, {}
    for sweep, changes in SWEEPS.items():
        for name in [name for name in NAMES if name in args.only]:
            if sweep == "group size" and name != "grpo":
                continue
            for change in changes:
                at = BASE | change
                label = trunk(at) if sweep == "model size" else next(iter(change.values()))
                key = (name, *at.values())
                if key not in known:
                    known[key] = point(name, at, args, speed)
                    print(
                        f"{sweep} {label}, {name}: {known[key]['seconds']:.3g} s, {known[key]['peak_mb']:.0f} MB",
                        flush=True,
                    )
                found.setdefault((sweep, name), []).append((label, known[key]))
    text = (
        table(found)
        + "\n\n"
        + ", ".join(f"{key} {value}" for key, value in (BASE | speed.about(args)).items())
    )
    Path(args.out, "scaling.md").write_text(text + "\n")
    Path(args.out, "scaling.json").write_text(
        json.dumps([[*key, points] for key, points in found.items()], indent=1)
    )
    draw(found, str(Path(args.out, "scaling.png")))
    print(text)
