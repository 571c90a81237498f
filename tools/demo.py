"""`make demo`: sft -> gvm_td -> dvpo on the embedded world; a table, a learning curve and a sentence coloured by value.

python tools/demo.py            # about two minutes on two cores; writes runs/demo/
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from assets import reviews  # noqa: E402

OUT = Path("runs/demo")
HALF, STEPS = 10, 20  # the reward must be up at HALF, and still be there at twice as many steps


def run(script: str, *flags: str) -> float:
    """One script as a user would start it; returns its seconds."""
    command = [script, "--run-dir", str(OUT / script.removesuffix(".py")), "--overwrite", *flags]
    print("\n$ python " + " ".join(command), flush=True)
    start = time.perf_counter()
    result = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]])
    if result.returncode:
        sys.exit(result.returncode)
    return time.perf_counter() - start


def read(script: str, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (OUT / script / name).read_text().splitlines()]


def picture(evaluations: list[dict], training: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    steps = [row["step"] for row in evaluations]
    left.plot(
        steps,
        [row["eval/reward"] for row in evaluations],
        "o-",
        color="#2a7",
        label="true reward, held-out prompts",
    )
    rolled = [row["step"] for row in training]
    left.plot(
        rolled,
        [row["objective/score"] for row in training],
        color="#999",
        lw=1,
        label="the GVM's estimate (standardised)",
    )
    left.set(xlabel="DVPO step (256 reviews each)", ylabel="reward", title="reward")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    right.plot(
        steps,
        [100 * row["eval/grammatical"] for row in evaluations],
        "o-",
        color="#27a",
        label="grammatical (%)",
    )
    right.plot(
        steps,
        [10 * row["eval/kl"] for row in evaluations],
        "s-",
        color="#a52",
        label="KL to the SFT policy (nats x 10)",
    )
    right.plot(
        steps, [row["eval/length"] for row in evaluations], "^-", color="#777", label="length (tokens)"
    )
    right.set(xlabel="DVPO step", ylim=(0, 105), title="what must not break")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sft, gvm = str(OUT / "sft/model"), str(OUT / "gvm_td/model")
    seconds = [run("sft.py", "--save-every", "0"), run("gvm_td.py", "--model", sft, "--save-every", "0")]
    seconds.append(run("dvpo.py", "--model", sft, "--gvm", gvm, "--steps", str(STEPS), "--eval-every", "5"))

    rows = {row["step"]: row for row in read("dvpo") if "eval/reward" in row}
    training = [row for row in read("dvpo") if "objective/score" in row]
    picture(list(rows.values()), training, OUT / "curve.png")
    samples = read("dvpo", "samples.jsonl")
    first = samples[0]["prompt"]
    print(f"\nheld-out prompt: {first}")
    for step in (0, HALF, STEPS):
        text = next(row["response"] for row in samples if row["step"] == step and row["prompt"] == first)
        print(f"  after {step:2d} steps: {text}")
    print(f"\n{'':34}{'true reward':>12}{'grammatical':>13}{'KL (nats)':>11}{'length':>8}")
    for step, name in (
        (0, "before (the SFT policy)"),
        (HALF, f"after {HALF} steps of DVPO"),
        (STEPS, f"after {STEPS}"),
    ):
        row = rows[step]
        cells = f"{row['eval/reward']:12.2f}{100 * row['eval/grammatical']:12.0f}%{row['eval/kl']:11.2f}{row['eval/length']:8.1f}"
        print(f"{name:34}{cells}")
    accuracy = json.loads((OUT / "gvm_td/accuracy.json").read_text())
    print(
        f"\nGVM: held-out pair accuracy {accuracy['mean']:.3f} by the mean token value, {accuracy['last']:.3f} by the last;"
    )
    print(f"     the longer review wins: {accuracy['baseline_length']:.3f}")
    print(f"seconds: sft {seconds[0]:.0f}, gvm_td {seconds[1]:.0f}, dvpo {seconds[2]:.0f}")
    print(
        f"pictures: {OUT}/curve.png (learning curve), {OUT}/gvm_td/values.png and .html (sentences coloured by value)"
    )
    problem = reviews.unsound(rows[0], rows[STEPS], rise=1.0)
    if problem:
        sys.exit(f"error: this installation does not work: {problem}; `make test` says where")


if __name__ == "__main__":
    main()
