"""The papers' policies compared on your own model and data: SFT, DPO, ReMax, GRPO, PPO, DVPO; SFT, KTO, DRO, RPO.

    python paper/real_policies.py --model SmolLM2-135M-Instruct --pairs pairs.jsonl.gz --scored scored.jsonl.gz \\
        --reward vader:positive --steps 200 --rl-steps 30 --flags "--max-response-length 128 --micro-batch-size 4"

`--pairs` needs prompt, chosen, rejected; `--scored` prompt, response, reward (without it: no KTO, DRO, RPO). Prompts are those of
the pairs, a fifth of them for RL (2502.16944's split), and the answers that are measured are to prompts which no script trains
on. Training uses the reward model that is made here; `--reward` (a reward model or module:function that nothing was
trained on) judges. Rates are the scripts' own: give yours, and all sizes, by the `--flags` options.
Resumes where it was stopped; writes OUT/table-policies.md: mean and standard deviation over seeds.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from paper.report import answers, markdown, spread, verdict
from tools.jobs import ROOT, Jobs

OFFLINE, ONLINE = ("dpo", "kto", "dro", "rpo"), ("remax", "grpo", "ppo", "dvpo")
NAMES = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "dro": "DRO-V", "rpo": "RPO"}
NAMES |= {"remax": "ReMax", "grpo": "GRPO", "ppo": "PPO", "dvpo": "DVPO"}


def commands(args) -> tuple[dict[str, list[str]], list[str]]:
    """All jobs by name, and the policies to measure."""
    data = {"pairs": ["--dataset", str(args.pairs)], "scored": ["--dataset", str(args.scored)]}
    common = ["--seed", "{seed}", "--save-every", "0", "--overwrite", *shlex.split(args.flags)]
    quiet = ["--eval-every", "0", *common]
    offline = [*quiet, "--steps", str(args.steps), *shlex.split(args.offline_flags)]
    online = [*quiet, "--steps", str(args.rl_steps), "--part", "rl", *shlex.split(args.rl_flags)]
    start, held = ["--model", "{home}/sft/model"], ["--eval-prompts", str(args.prompts)]
    source = data["scored"] if args.scored else [*data["pairs"], "--columns", "response", "chosen"]
    jobs = {
        "sft": ["sft.py", "--model", args.model, *source, "--part", "sft", *offline],
        "reward": ["reward.py", *start, *data["pairs"], "--part", "value", *offline],
        "gvm": ["gvm_td.py", *start, *data["pairs"], "--part", "value", "--source", "preference", *offline],
        "dpo": ["dpo.py", *start, *data["pairs"], "--part", "value", *offline],
    }
    for name in ("kto", "dro", "rpo") if args.scored else ():
        jobs[name] = [f"{name}.py", *start, *data["scored"], "--part", "value", *offline]
        if name == "kto":
            jobs[name] += ["--threshold", str(args.threshold)]
    for name in ONLINE:
        critic = ["--gvm", "{home}/gvm/model"] if name == "dvpo" else ["--reward", "{home}/reward/model"]
        jobs[name] = [f"{name}.py", *start, *data["pairs"], *critic, *online, *held]
    wanted = [name for name in args.only if name in jobs]
    lengths = [
        word
        for flag in ("--max-prompt-length", "--max-response-length")
        for word in value_of(flag, args.flags)
    ]
    jobs["measured"] = [
        "evaluate.py",
        "responses",
        *data["pairs"],
        "--part",
        "rl",
        "--prompts",
        str(args.prompts),
        "--temperature",
        "1",
        "--seed",
        "{seed}",
        "--overwrite",
        *lengths,
        "--reward",
        *args.reward,
        "--models",
        *[f"{{home}}/{name}/model" for name in wanted],
        "--names",
        *wanted,
    ]
    return jobs, wanted


def value_of(flag: str, flags: str) -> list[str]:
    """A flag and its value where `flags` has it."""
    words = shlex.split(flags)
    return words[words.index(flag) : words.index(flag) + 2] if flag in words else []


def report(out: Path, seeds: list[int], wanted: list[str]) -> str:
    """The summaries of `evaluate.py responses`: every number it measured, and which policy is above SFT in every seed."""
    found = {name: [answers(out, seed, "measured", name)[1] for seed in seeds] for name in wanted}
    keys = [key for key, value in found[wanted[0]][0].items() if isinstance(value, dict) and "mean" in value]
    rows = [
        [NAMES[name], *(spread([f[key]["mean"] for f in found[name]]) for key in keys)] for name in wanted
    ]
    lines = []
    judged = [key for key in keys if key not in ("length", "characters", "truncated", "distinct_2")]
    for key in judged if "sft" in wanted else ():
        at = {name: [f[key]["mean"] for f in found[name]] for name in wanted}
        better = [
            f"{NAMES[n]}: {verdict([a - b for a, b in zip(at[n], at['sft'], strict=True)])}"
            for n in wanted
            if n != "sft"
        ]
        lines.append(f"- {key}, above SFT: " + "; ".join(better))
    return (
        markdown(["", *keys], rows)
        + "\n\n"
        + "\n".join(lines)
        + f"\n\nMean ± standard deviation over seeds {seeds}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="policy that SFT starts from: folder or hub id")
    parser.add_argument("--pairs", required=True, help="preference data: hub id or file")
    parser.add_argument("--scored", default="", help="scored responses, for SFT, KTO, DRO and RPO")
    parser.add_argument(
        "--reward", nargs="+", required=True, help="reward models or module:functions that judge"
    )
    parser.add_argument(
        "--only", nargs="+", default=[*NAMES], choices=[*NAMES], help="these policies and what they need"
    )
    parser.add_argument("--steps", type=int, default=300, help="of everything that is trained offline")
    parser.add_argument("--rl-steps", type=int, default=100)
    parser.add_argument("--threshold", type=float, default=0.0, help="KTO: a reward above it is desirable")
    parser.add_argument("--prompts", type=int, default=128, help="held out of RL and measured")
    parser.add_argument(
        "--flags", default="", help="options that every script gets, e.g. lengths and micro-batch size"
    )
    parser.add_argument(
        "--offline-flags", default="", help="options of sft, reward, gvm_td, dpo, kto, dro, rpo"
    )
    parser.add_argument("--rl-flags", default="", help="options of remax, grpo, ppo, dvpo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/policies"))
    args = parser.parse_args()
    os.environ |= {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(ROOT)]),
    }
    jobs, wanted = commands(args)
    Jobs(args.out, jobs, [(seed, "measured") for seed in args.seeds], set()).run(args.workers)
    text = report(args.out, args.seeds, wanted)
    (args.out / "table-policies.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
