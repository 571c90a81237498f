"""`make demo`: sft -> gvm_td -> dvpo on the embedded world; a table, a learning curve and a sentence coloured
by value.

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
from assets import reviews

OUT = Path("runs/demo")
HALF = 10  # DVPO steps after which the reward must be up
STEPS = 20  # twice as many, after which it must still be there


def run(script: str, *flags: str) -> float:
    """One script as a user would start it; returns its seconds. Ends the demo where the script fails."""
    folder = OUT / script.removesuffix(".py")
    command = [script, "--run-dir", str(folder), "--overwrite", *flags]
    print("\n$ python " + " ".join(command), flush=True)
    start = time.perf_counter()
    result = subprocess.run([sys.executable, str(ROOT / script), *command[1:]])
    if result.returncode:
        sys.exit(result.returncode)
    return time.perf_counter() - start


def read(script: str, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of a file of a script's run folder."""
    return [json.loads(line) for line in (OUT / script / name).read_text().splitlines()]


def picture(evaluations: list[dict], training: list[dict], path: Path) -> None:
    """The learning curve: the reward on the left, on the right what must not break while it rises."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    steps = [row["step"] for row in evaluations]
    training_steps = [row["step"] for row in training]

    true_reward = [row["eval/reward"] for row in evaluations]
    estimate = [row["objective/score"] for row in training]
    left.plot(steps, true_reward, "o-", color="#2a7", label="true reward, held-out prompts")
    left.plot(training_steps, estimate, color="#999", lw=1, label="the GVM's estimate (standardised)")
    left.set(xlabel="DVPO step (256 reviews each)", ylabel="reward", title="reward")
    left.legend(frameon=False, fontsize=8, loc="lower right")

    # scaled to share one axis from 0 to 105
    grammatical = [100 * row["eval/grammatical"] for row in evaluations]
    kl = [10 * row["eval/kl"] for row in evaluations]
    length = [row["eval/length"] for row in evaluations]
    right.plot(steps, grammatical, "o-", color="#27a", label="grammatical (%)")
    right.plot(steps, kl, "s-", color="#a52", label="KL to the SFT policy (nats x 10)")
    right.plot(steps, length, "^-", color="#777", label="length (tokens)")
    right.set(xlabel="DVPO step", ylim=(0, 105), title="what must not break")
    right.legend(frameon=False, fontsize=8)

    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def show_samples(samples: list[dict]) -> None:
    """What the policy answers to one held-out prompt, before, half way and after."""
    prompt = samples[0]["prompt"]
    print(f"\nheld-out prompt: {prompt}")
    for step in (0, HALF, STEPS):
        responses = [row["response"] for row in samples if row["step"] == step and row["prompt"] == prompt]
        print(f"  after {step:2d} steps: {responses[0]}")


def show_table(evaluations: dict[int, dict]) -> None:
    """The evaluations before, half way and after, by step."""
    names = {
        0: "before (the SFT policy)",
        HALF: f"after {HALF} steps of DVPO",
        STEPS: f"after {STEPS}",
    }
    print(f"\n{'':34}{'true reward':>12}{'grammatical':>13}{'KL (nats)':>11}{'length':>8}")
    for step, name in names.items():
        row = evaluations[step]
        reward = f"{row['eval/reward']:12.2f}"
        grammatical = f"{100 * row['eval/grammatical']:12.0f}%"
        kl = f"{row['eval/kl']:11.2f}"
        length = f"{row['eval/length']:8.1f}"
        print(f"{name:34}{reward}{grammatical}{kl}{length}")


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sft = str(OUT / "sft/model")
    gvm = str(OUT / "gvm_td/model")
    sft_seconds = run("sft.py", "--save-every", "0")
    gvm_seconds = run("gvm_td.py", "--model", sft, "--save-every", "0")
    dvpo_seconds = run("dvpo.py", "--model", sft, "--gvm", gvm, "--steps", str(STEPS), "--eval-every", "5")

    evaluations = {row["step"]: row for row in read("dvpo") if "eval/reward" in row}
    training = [row for row in read("dvpo") if "objective/score" in row]
    picture(list(evaluations.values()), training, OUT / "curve.png")
    show_samples(read("dvpo", "samples.jsonl"))
    show_table(evaluations)

    accuracy = json.loads((OUT / "gvm_td/accuracy.json").read_text())
    by_mean = f"{accuracy['mean']:.3f} by the mean token value"
    by_last = f"{accuracy['last']:.3f} by the last"
    print(f"\nGVM: held-out pair accuracy {by_mean}, {by_last};")
    print(f"     the longer review wins: {accuracy['baseline_length']:.3f}")
    print(f"seconds: sft {sft_seconds:.0f}, gvm_td {gvm_seconds:.0f}, dvpo {dvpo_seconds:.0f}")
    curve = f"{OUT}/curve.png (learning curve)"
    print(f"pictures: {curve}, {OUT}/gvm_td/values.png and .html (sentences coloured by value)")

    # a demo that learned nothing must not look like one that works
    problem = reviews.unsound(evaluations[0], evaluations[STEPS], rise=1.0)
    if problem:
        sys.exit(f"error: this installation does not work: {problem}; `make test` says where")


if __name__ == "__main__":
    main()
