"""The papers' policies compared on your own model and data: SFT, DPO, ReMax, GRPO, PPO, DVPO; SFT, KTO, DRO,
RPO.

    python paper/real_policies.py --model SmolLM2-135M-Instruct --reward vader:positive \\
        --pairs pairs.jsonl.gz --scored scored.jsonl.gz --steps 200 --rl-steps 30 \\
        --flags "--max-response-length 128 --micro-batch-size 4"

`--pairs` needs prompt, chosen, rejected; `--scored` prompt, response, reward (without it: no KTO, DRO, RPO).
Prompts are those of the pairs, a fifth of them for RL (2502.16944's split), and the answers that are measured
are to prompts which no script trains on. Training uses the reward model that is made here; `--reward` (a
reward model or module:function that nothing was trained on) judges. Rates are the scripts' own: give yours,
and all sizes, by the `--flags` options. Resumes where it was stopped; writes OUT/table-policies.md: mean and
standard deviation over seeds.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.tables import markdown
from paper.report import answers, minus, spread, verdict
from tools.jobs import ROOT, Jobs

SCORED = ("kto", "dro", "rpo")  # trained on scored responses
ONLINE = ("remax", "grpo", "ppo", "dvpo")
NAMES = {
    "sft": "SFT",
    "dpo": "DPO",
    "kto": "KTO",
    "dro": "DRO-V",
    "rpo": "RPO",
    "remax": "ReMax",
    "grpo": "GRPO",
    "ppo": "PPO",
    "dvpo": "DVPO",
}
NOT_JUDGED = ("length", "characters", "truncated", "distinct_2")  # more of it is not better


def commands(args: argparse.Namespace) -> tuple[dict[str, list[str]], list[str]]:
    """All jobs by name, and the policies to measure. tools/jobs.py says what the braces mean."""
    pairs = ["--dataset", str(args.pairs)]
    scored = ["--dataset", str(args.scored)]
    responses = scored if args.scored else [*pairs, "--columns", "response", "chosen"]
    common = ["--eval-every", "0", "--seed", "{seed}", "--save-every", "0", "--overwrite"]
    common += shlex.split(args.flags)
    offline = [*common, "--steps", str(args.steps), *shlex.split(args.offline_flags)]
    online = [*common, "--steps", str(args.rl_steps), "--part", "rl", *shlex.split(args.rl_flags)]
    start = ["--model", "{home}/sft/model"]
    # each part of the prompts goes to one stage
    value_part = ["--part", "value"]

    jobs = {}
    jobs["sft"] = ["sft.py", "--model", args.model, *responses, "--part", "sft", *offline]
    jobs["reward"] = ["reward.py", *start, *pairs, *value_part, *offline]
    jobs["gvm"] = ["gvm_td.py", *start, *pairs, *value_part, "--source", "preference", *offline]
    jobs["dpo"] = ["dpo.py", *start, *pairs, *value_part, *offline]
    if args.scored:
        for name in SCORED:
            jobs[name] = [f"{name}.py", *start, *scored, *value_part, *offline]
        jobs["kto"] += ["--threshold", str(args.threshold)]
    for name in ONLINE:
        judge = ["--reward", "{home}/reward/model"]
        if name == "dvpo":
            judge = ["--gvm", "{home}/gvm/model"]
        held_out = ["--eval-prompts", str(args.prompts)]
        jobs[name] = [f"{name}.py", *start, *pairs, *judge, *online, *held_out]

    wanted = [name for name in args.only if name in jobs]
    measure = ["evaluate.py", "responses", *pairs, "--part", "rl", "--prompts", str(args.prompts)]
    measure += ["--temperature", "1", "--seed", "{seed}", "--overwrite"]
    measure += value_of("--max-prompt-length", args.flags)
    measure += value_of("--max-response-length", args.flags)
    measure += ["--reward", *args.reward]
    measure += ["--models", *[f"{{home}}/{name}/model" for name in wanted]]
    measure += ["--names", *wanted]
    jobs["measured"] = measure
    return jobs, wanted


def value_of(flag: str, flags: str) -> list[str]:
    """A flag and its value where `flags` has it."""
    words = shlex.split(flags)
    if flag not in words:
        return []
    at = words.index(flag)
    return words[at : at + 2]


def report(out: Path, seeds: list[int], wanted: list[str]) -> str:
    """The summaries of `evaluate.py responses`: every number it measured, and which policy is above SFT in
    every seed."""
    found = {}  # by policy: a summary per seed
    for name in wanted:
        found[name] = []
        for seed in seeds:
            _, summary = answers(out, seed, "measured", name)
            found[name].append(summary)
    first = found[wanted[0]][0]
    keys = [key for key, value in first.items() if isinstance(value, dict) and "mean" in value]

    def means(name: str, key: str) -> list[float]:
        """One per seed."""
        return [summary[key]["mean"] for summary in found[name]]

    rows = []
    for name in wanted:
        rows.append([NAMES[name], *[spread(means(name, key)) for key in keys]])
    table = markdown(["", *keys], rows)

    lines = []
    if "sft" in wanted:
        others = [name for name in wanted if name != "sft"]
        for key in keys:
            if key in NOT_JUDGED:
                continue
            verdicts = []
            for name in others:
                above = verdict(minus(means(name, key), means("sft", key)))
                verdicts.append(f"{NAMES[name]}: {above}")
            lines.append(f"- {key}, above SFT: " + "; ".join(verdicts))
    note = f"Mean ± standard deviation over seeds {seeds}."
    return table + "\n\n" + "\n".join(lines) + "\n\n" + note + "\n"


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
    parser.add_argument("--rl-steps", type=int, default=100, help="of remax, grpo, ppo, dvpo")
    parser.add_argument("--threshold", type=float, default=0.0, help="KTO: a reward above it is desirable")
    parser.add_argument("--prompts", type=int, default=128, help="held out of RL and measured")
    parser.add_argument(
        "--flags", default="", help="options that every script gets, e.g. lengths and micro-batch size"
    )
    parser.add_argument(
        "--offline-flags", default="", help="options of sft, reward, gvm_td, dpo, kto, dro, rpo"
    )
    parser.add_argument("--rl-flags", default="", help="options of remax, grpo, ppo, dvpo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="everything is done for each")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/policies"), help="all runs lie in it")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # a --reward of yours (module:function) is found where you are
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), str(ROOT)])
    jobs, wanted = commands(args)
    measured = [(seed, "measured") for seed in args.seeds]
    Jobs(args.out, jobs, measured, shared=set()).run(args.workers)
    text = report(args.out, args.seeds, wanted)
    (args.out / "table-policies.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
