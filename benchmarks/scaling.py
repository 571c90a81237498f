"""What a step of our RL scripts costs as the work grows: `python benchmarks/speed.py --scaling`.

grpo.py, dvpo.py and ppo.py as they are, on random models, one thing varied at a time around one base:
response length, batch, group size, vocabulary, model size. Each point has its arithmetic next to it (`flops`,
`megabytes`): what a step must compute and hold. Overheads make small work relatively expensive, so measured
cost may grow slower than the formula; where it grows faster between two neighbouring points, by more than the
tolerance, something does needless work, and the table says so.
"""

import json
import statistics
import sys
from pathlib import Path

from common.tables import markdown

NAMES = ("grpo", "dvpo", "ppo")
BASE = {
    "width": 128,
    "layers": 4,
    "vocab": 4096,
    "batch": 16,
    "group": 4,
    "prompt": 32,
    "response": 128,
    "micro": 4,
}
SWEEPS = {  # what is varied: what is changed in BASE, a point each
    "response length": [{"response": n} for n in (64, 128, 256, 512, 1024)],
    "batch": [{"batch": n} for n in (8, 16, 32, 64)],
    "group size": [{"group": n} for n in (2, 4, 8, 16)],
    "vocabulary": [{"vocab": n} for n in (1024, 4096, 16384, 65536, 131072)],
    "model size": [
        {"width": 64, "layers": 2},
        {"width": 128, "layers": 4},
        {"width": 256, "layers": 6},
        {"width": 512, "layers": 8},
    ],
}
TOLERANCE = 1.25  # of one growth over the other; times on one machine differ by that much


# --- the formulas -------------------------------------------------------------------------------------------


def inner(at: dict) -> int:
    """Width of the MLP, a multiple of 8."""
    return 8 * at["width"] // 3 // 8 * 8


def trunk(at: dict) -> int:
    """Weights of the transformer blocks: 4 width^2 of attention and 3 width * inner of the MLP, per layer."""
    return at["layers"] * (4 * at["width"] ** 2 + 3 * at["width"] * inner(at))


def flops(name: str, at: dict, epochs: int) -> float:
    """Of one step, with N weights in the trunk, L = prompt + response tokens, R of them the response's, B
    sequences.

    A forward pass of the trunk: B (2 N L + 2 layers width L^2); of the output layer: B R 2 width vocab. A
    backward pass is twice that; the output layer is computed anew in it. Sampling with a cache is one forward
    pass, scoring one of the reference, one of the policy where it is updated more than once, and one of the
    trunk for each of the critic or GVM and the reward model. Group size is no term.
    """
    length = at["prompt"] + at["response"]
    body = at["batch"] * (2 * trunk(at) * length + 2 * at["layers"] * at["width"] * length**2)
    head = at["batch"] * at["response"] * 2 * at["width"] * at["vocab"]
    forwards = 2  # sampling, and scoring by the reference
    if epochs > 1:
        forwards += 1  # scoring by the policy
    if name == "grpo":
        trunks = 0
    elif name == "dvpo":
        trunks = 1  # the GVM
    else:
        trunks = 2 + 3 * epochs  # reward model and critic, and the critic's update
    return forwards * (body + head) + epochs * (3 * body + 4 * head) + trunks * body


def megabytes(name: str, at: dict) -> float:
    """Held at the peak in float32: trained weights four times (gradient, two moments), frozen ones once; and
    the greater of

    - the rollout: keys and values of all sequences, and of their next tokens five arrays of the vocabulary in
      float64;
    - the update: of a micro-batch some 16 arrays of the width and 4 of the MLP's per layer, and four chunks
      of 512 rows of logits.
    """
    length = at["prompt"] + at["response"]
    embeddings = at["vocab"] * at["width"]
    policy = trunk(at) + 2 * embeddings  # tokens in and logits out
    valued = trunk(at) + embeddings
    weights = 5 * policy  # trained, and the reference
    if name == "dvpo":
        weights += valued  # the GVM
    elif name == "ppo":
        weights += 5 * valued  # the critic, trained, and the reward model
    state = 4 * weights

    keys_and_values = length * 2 * at["width"] * at["layers"] * 4
    next_token = 5 * 8 * at["vocab"]
    rollout = at["batch"] * (keys_and_values + next_token)

    rows = at["micro"] * length
    activations = 4 * rows * at["layers"] * (16 * at["width"] + 4 * inner(at))
    logits = 4 * 4 * min(512, at["micro"] * at["response"]) * at["vocab"]
    update = activations + logits
    return (state + max(rollout, update)) / 2**20


def too_fast(measured: list[float], formula: list[float], tolerance: float = TOLERANCE) -> list[int]:
    """The points i to which `measured` grew by more than `tolerance` times what `formula` did, from the point
    before."""
    points = []
    for i in range(1, len(measured)):
        growth = measured[i] / measured[i - 1]
        # in this order of operations: (tolerance * formula[i]) / formula[i - 1]
        if growth > tolerance * formula[i] / formula[i - 1]:
            points.append(i)
    return points


# --- measuring ----------------------------------------------------------------------------------------------


def point(name: str, at: dict, args, speed) -> dict:
    """Seconds of a step, its peak memory in MB, and the two formulas. `speed`: the module, see `main`."""
    epochs = 1 if name == "grpo" else 4
    steps = args.steps + 1  # the first is not timed
    folder = Path(args.out, "scaling").absolute()

    models = folder / f"model-{at['width']}-{at['layers']}-{at['vocab']}"
    models.mkdir(parents=True, exist_ok=True)
    shape = {
        "vocab_size": at["vocab"],
        "hidden_size": at["width"],
        "intermediate_size": inner(at),
        "num_hidden_layers": at["layers"],
        "num_attention_heads": max(2, at["width"] // 64),
    }
    paths = speed.make_models(models, shape, 8)

    size = {key: at[key] for key in ("prompt", "response", "batch", "micro")}
    size["epochs"] = epochs
    if name == "grpo":
        size["group"] = at["group"]
    rows = speed.make_rows(name, size, steps, at["vocab"], 8)
    for row in rows:  # all of one length: what is varied is varied alone
        words = row["prompt"].split() * at["prompt"]
        row["prompt"] = " ".join(words[: at["prompt"] - 1])  # and the BOS
    key = "-".join(str(value) for value in at.values())
    stem = folder / f"{name}-{key}"
    speed.write_rows(Path(f"{stem}.jsonl"), rows)

    spec = {
        "side": "ours",
        "device": args.device,
        "out": f"{stem}.json",
        "run_dir": str(stem),
        "script": name,
        "arguments": speed.our_arguments(name, paths, {"ours": f"{stem}.jsonl"}, size, steps, stem),
    }
    record = speed.run_side(sys.executable, spec, Path(f"{stem}.log"))
    if "error" in record:
        sys.exit(f"error: {record['error']}")
    return {
        "seconds": statistics.median(speed.differences([step["at"] for step in record["steps"]])),
        "peak_mb": record["peak_mb"],
        "gflops": flops(name, at, epochs) / 1e9,
        "formula_mb": megabytes(name, at),
    }


# --- the table and the picture ------------------------------------------------------------------------------


def table(found: dict) -> str:
    """Markdown; `found`: {(sweep, name): [(label, point)]}."""
    head = ["", "", "s a step", "GFLOP of the formula", "peak MB", "MB of the formula", "grows faster"]
    rows = []
    for (sweep, name), points in found.items():
        time_grows = too_fast([at["seconds"] for _, at in points], [at["gflops"] for _, at in points])
        memory_grows = too_fast([at["peak_mb"] for _, at in points], [at["formula_mb"] for _, at in points])
        for i, (label, at) in enumerate(points):
            faster = []
            if i in time_grows:
                faster.append("time")
            if i in memory_grows:
                faster.append("memory")
            cells = [
                f"{sweep} {label}",
                name,
                f"{at['seconds']:.3g}",
                f"{at['gflops']:.3g}",
                f"{at['peak_mb']:,.0f}",
                f"{at['formula_mb']:,.0f}",
                ", ".join(faster),
            ]
            rows.append(cells)
    return markdown(head, rows)


def draw(found: dict, path: str) -> None:
    """Measured points, and dashed what the formula makes of the first one: a curve above its dashes grows
    faster."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sweeps = list(dict.fromkeys(sweep for sweep, _ in found))
    figure, axes = plt.subplots(2, len(sweeps), figsize=(3.2 * len(sweeps), 6), squeeze=False, sharey="row")
    for column, sweep in enumerate(sweeps):
        draw_sweep(axes[0][column], found, sweep, "seconds", "gflops")
        draw_sweep(axes[1][column], found, sweep, "peak_mb", "formula_mb")
    axes[0][0].set_ylabel("s a step")
    axes[1][0].set_ylabel("peak MB")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_sweep(axis, found: dict, sweep: str, key: str, formula: str) -> None:
    """What one kind of cost does in one sweep, a colour per script."""
    colour = 0
    for (other, name), points in found.items():
        if other != sweep:
            continue
        labels = [label for label, _ in points]
        measured = [at[key] for _, at in points]
        _, first = points[0]
        predicted = [first[key] * at[formula] / first[formula] for _, at in points]
        axis.plot(labels, measured, "o-", color=f"C{colour}", label=name)
        axis.plot(labels, predicted, "--", color=f"C{colour}", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=sweep)
        axis.set_xticks(labels, [in_short(label) for label in labels])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        colour += 1


def in_short(number: int) -> str:
    """12345 as 12k."""
    if number >= 1e6:
        return f"{number / 1e6:.2g}M"
    if number >= 1e4:
        return f"{number / 1e3:.0f}k"
    return str(number)


def main(args, speed) -> None:
    """All sweeps. `args` are speed.py's; `speed` is that module, which runs as a file and so cannot be
    imported from here."""
    found = {}  # (sweep, name): [(label, point)]
    known = {}  # a point that several sweeps share is measured once
    for sweep, changes in SWEEPS.items():
        for name in NAMES:
            if name not in args.only:
                continue
            if sweep == "group size" and name != "grpo":
                continue
            found[sweep, name] = []
            for change in changes:
                at = BASE | change
                label = trunk(at) if sweep == "model size" else next(iter(change.values()))
                key = (name, *at.values())
                if key not in known:
                    known[key] = point(name, at, args, speed)
                    cost = f"{known[key]['seconds']:.3g} s, {known[key]['peak_mb']:.0f} MB"
                    print(f"{sweep} {label}, {name}: {cost}", flush=True)
                found[sweep, name].append((label, known[key]))
    about = BASE | speed.about(args)
    text = table(found) + "\n\n" + ", ".join(f"{key} {value}" for key, value in about.items())
    Path(args.out, "scaling.md").write_text(text + "\n")
    points = [[*key, points] for key, points in found.items()]
    Path(args.out, "scaling.json").write_text(json.dumps(points, indent=1))
    draw(found, str(Path(args.out, "scaling.png")))
    print(text)
