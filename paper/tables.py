"""The tables and pictures of 2502.16944 (DVPO) and 2506.13702 (RPO), as far as they can be made, on the embedded world.

    python paper/tables.py                      # make tables: everything, 3 seeds, about an hour on 2 cores
    python paper/tables.py --quick              # make tables QUICK=1: one seed, a tenth of the steps, to try it
    python paper/tables.py --only beta          # one table and what it needs
    python paper/tables.py --docs docs          # also puts tables and pictures into docs/results.md

Resumes where it was stopped. All runs lie below runs/tables (commands in their job.json), tables there as table-*.md.
Each table has a column with the paper's figure or claim, on its own models, and one that says whether it holds here: by the
sign of the difference in every seed.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.data import hold_out, prompt_hash, read_rows
from paper import report
from tools.jobs import Jobs

KNOWN, OTHERS = (
    ("critic", "regular", "tourist"),
    ("grump", "poet"),
)  # authors: what a value model has read, has not
UNSEEN = (
    "salad",
    "coffee",
    "waiter",
    "music",
)  # dishes that no offline row names; the SFT policy knows the words
SIZES = {
    "16": (16, 2, 1),
    "32": (32, 2, 2),
    "128": (128, 3, 4),
    "192": (192, 3, 4),
}  # hidden size, layers, heads

RL = "--model {out}/sft/model --seed {seed} --eval-every 3".split()
OFFLINE = "--model {out}/sft/model --seed {seed} --eval-every 30".split()
VALUE = "--model {out}/sft/model --seed {seed}".split()
WORLD = (
    "--max-prompt-length 16 --max-response-length 32 --micro-batch-size 64".split()
)  # a file has no embedded defaults
REWARDS = "--eval-reward assets.reviews:reward assets.reviews:grammatical".split()
METHODS = {  # offline: script and flags on a file, as the embedded world's defaults have them
    "sft": ["sft.py", "--lr", "1e-3"],
    "kto": "kto.py --lr 3e-4 --threshold 0 --desirable-weight 2.1 --warmup-steps 20 --no-precompute-ref".split(),
    "dro": "dro.py --lr 3e-5 --value-lr 3e-3 --tau 0.3 --warmup-steps 20 --no-precompute-ref".split(),
    "rpo": "rpo.py --lr 1e-3 --tau 0.3 --warmup-steps 20 --no-precompute-ref".split(),
    "dpo": "dpo.py --lr 1e-4 --beta 0.5 --warmup-steps 20 --no-precompute-ref".split(),
}
ABLATIONS = {  # of RPO: job and flags
    "tau_01": ["--tau", "0.1"],
    "tau_1": ["--tau", "1"],
    "no_partition": ["--no-partition"],
    "no_partition_normalised": ["--no-partition", "--length-normalise"],
    "keep_75": ["--keep-responses", "0.75"],
    "keep_50": ["--keep-responses", "0.5"],
    "keep_25": ["--keep-responses", "0.25"],
    "noise_01": ["--reward-noise", "0.1"],
    "noise_05": ["--reward-noise", "0.5"],
    "noise_10": ["--reward-noise", "1.0"],
}


def commands(quick: bool) -> dict[str, list[str]]:
    """All jobs by name; see jobs.py for what the braces mean."""
    steps = lambda n: ["--steps", str(max(3, n // 10) if quick else n), "--save-every", "0", "--overwrite"]
    sizes = {name: ["--lr", f"{0.192 / int(name):.1e}"] for name in SIZES}  # 1 / width, 3e-3 at 64
    judged = "{home}/gvm_known/model {home}/reward_known/model {home}/ppo_known/critic".split()
    judge = ["evaluate.py", "values", "--draw", "0", *WORLD, "--models", *judged]
    known = (
        "--dataset {out}/data/known_pairs.jsonl --eval-fraction 0.1 --split-seed 1 --batch-size 64".split()
        + WORLD
    )
    jobs = {
        # 2502.16944: one SFT policy, reward models and value models from it, and what is trained with them
        "sft": ["sft.py", *steps(500)],
        "reward": ["reward.py", *VALUE, *steps(200)],
        "gvm_scores": ["gvm_td.py", *VALUE, "--reward", "{home}/reward/model", *steps(500)],
        "gvm_pairs": ["gvm_td.py", *VALUE, "--source", "preference", *steps(500)],
        "gvm_true": ["gvm_td.py", *VALUE, *steps(500)],
        "ppo": ["ppo.py", *RL, "--reward", "{home}/reward/model", *steps(30)],
        "dvpo": ["dvpo.py", *RL, "--gvm", "{home}/gvm_scores/model", *steps(30)],
        "dvpo_pairs": ["dvpo.py", *RL, "--gvm", "{home}/gvm_pairs/model", *steps(30)],
        "grpo": ["grpo.py", *RL, "--reward", "{home}/reward/model", *steps(30)],
        "remax": ["remax.py", *RL, "--reward", "{home}/reward/model", *steps(30)],
        "dpo": ["dpo.py", *OFFLINE, *steps(300)],
        "dvpo_beta_005": ["dvpo.py", *RL, "--gvm", "{home}/gvm_scores/model", "--beta", "0.05", *steps(30)],
        "dvpo_beta_001": ["dvpo.py", *RL, "--gvm", "{home}/gvm_scores/model", "--beta", "0.01", *steps(30)],
        # value models trained on some authors, judged on others
        "data": ["paper/tables.py", "--write-data"],
        "gvm_known": ["gvm_td.py", *VALUE, *known, "--lr", "3e-3", *steps(500)],
        "reward_known": ["reward.py", *VALUE, *known, "--lr", "2e-3", *steps(200)],
        "ppo_known": ["ppo.py", *RL, "--reward", "{home}/reward_known/model", *steps(30)],
        "judged_in": [*judge, "--dataset", "{out}/data/in_pairs.jsonl"],
        "judged_out": [*judge, "--dataset", "{out}/data/out_pairs.jsonl"],
        "judged": [
            "evaluate.py",
            "values",
            "--like",
            "{home}/gvm_pairs",
            "--models",
            "{home}/gvm_pairs/model",
            "{home}/gvm_true/model",
            "{home}/gvm_scores/model",
            "{home}/reward/model",
            "{home}/ppo/critic",
            "--draw",
            "0",
        ],
        # 2506.13702: all on the same scored responses
        "offline_sft": ["sft.py", *OFFLINE, *"--part value --lr 1e-3".split(), *steps(300)],
        "kto": ["kto.py", *OFFLINE, *steps(300)],
        "dro": ["dro.py", *OFFLINE, *steps(300)],
        "rpo": ["rpo.py", *OFFLINE, *steps(300)],
        # SFT has no reference: the first evaluation of rpo.py measures it
        "offline_sft_measured": [
            "rpo.py",
            *"--model {home}/offline_sft/model --ref-model {out}/sft/model --lr 1e-12".split(),
            *steps(1),
        ],
    }
    for name, lr in sizes.items():
        jobs[f"sft_{name}"] = ["sft.py", "--model", f"{{out}}/data/size-{name}", *lr, *steps(500)]
        jobs[f"gvm_{name}"] = [
            "gvm_td.py",
            "--model",
            f"{{out}}/sft_{name}/model",
            "--seed",
            "{seed}",
            "--source",
            "preference",
            *lr,
            *steps(500),
        ]
    for name in ("kto", "dro", "rpo", "dpo"):
        jobs[f"{name}_normalised"] = [*jobs[name], "--length-normalise"]
    answer = [
        "evaluate.py",
        "responses",
        *WORLD,
        *"--temperature 1 --batch-size 256 --overwrite --seed {seed}".split(),
    ]
    answer += "--reward assets.reviews:reward assets.reviews:grammatical".split()
    for name, models in (
        ("measured", ["dpo", "remax", "grpo", "ppo", "dvpo", "dvpo_pairs"]),
        ("measured_seen", [f"seen_{x}" for x in METHODS]),
        ("measured_unseen", [f"seen_{x}" for x in METHODS]),
    ):
        prompts = name.replace("measured", "prompts")
        paths = ["{out}/sft/model", *[f"{{home}}/{model}/model" for model in models]]
        names = ["before", *[model.removeprefix("seen_") for model in models]]
        jobs[name] = [
            *answer,
            "--dataset",
            f"{{out}}/data/{prompts}.jsonl",
            "--models",
            *paths,
            "--names",
            *names,
        ]
    for name, flags in ABLATIONS.items():
        jobs[f"rpo_{name}"] = [*jobs["rpo"], *flags]
    for name, flags in METHODS.items():
        file = "{out}/data/seen_pairs.jsonl" if name == "dpo" else "{out}/data/seen.jsonl"
        size = ["--batch-size", "32" if name == "dpo" else "64"]
        jobs[f"seen_{name}"] = [
            *flags,
            *OFFLINE,
            "--dataset",
            file,
            *"--eval-fraction 0.05 --split-seed 1 --eval-prompts 32".split(),
            *WORLD,
            *size,
            *REWARDS,
            *steps(300),
        ]
    return jobs


def write_data(out: Path) -> None:
    """Pairs by some authors and by others, rows without some dishes, prompts, and untrained models of other sizes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from assets import reviews

    def write(name, rows):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def neighbours(rows):
        """Pairs of neighbouring responses to a prompt, as reviews.rows makes them."""
        for a, b in zip(rows, rows[1:], strict=False):
            low, high = sorted((a, b), key=lambda row: row["reward"])
            if a["prompt"] == b["prompt"] and high["reward"] - low["reward"] >= reviews.MIN_GAP:
                who = {"chosen_policy": high["policy"], "rejected_policy": low["policy"]}
                subset = "clear" if high["reward"] - low["reward"] >= 1.5 else "close"
                yield {
                    "prompt": a["prompt"],
                    "chosen": high["response"],
                    "rejected": low["response"],
                    "subset": subset,
                    **who,
                }

    train, held_out = hold_out(read_rows("reviews", "prompts", part="value"), 0.2, 0)
    for name, prompts, authors in (
        ("known", train, KNOWN),
        ("in", held_out, KNOWN),
        ("out", held_out, OTHERS),
    ):
        rng, rows = random.Random(2), []
        for prompt in (row["prompt"] for row in prompts):
            for author in rng.choices(authors, k=16):
                text = reviews.write(author, prompt, rng)
                score = reviews.reward([prompt], [text])[0]
                rows.append({"prompt": prompt, "response": text, "reward": score, "policy": author})
        write(f"{name}_pairs.jsonl", neighbours(rows))
    rows = hold_out(read_rows("reviews", "scored", part="value"), 0.2, 0)[0]
    seen = [row for row in rows if not set(row["prompt"].split()) & set(UNSEEN)]
    seen = [row for row in seen if not set(row["response"].split()) & set(UNSEEN)]  # nor in a remark
    write(
        "seen.jsonl", [{key: row[key] for key in ("prompt", "response", "reward", "policy")} for row in seen]
    )
    write("seen_pairs.jsonl", neighbours(seen))
    count = lambda row: len(set(row["prompt"].split()) & set(UNSEEN))
    rl = sorted(read_rows("reviews", "prompts", part="rl"), key=lambda row: prompt_hash(row["prompt"], 1))
    texts = lambda rows: [{"prompt": row["prompt"]} for row in rows]
    write("prompts.jsonl", texts(held_out + rl[:96]))  # those that the online scripts hold out
    write(
        "prompts_seen.jsonl", texts(row for row in held_out + rl if not count(row))
    )  # no offline script reads the part `rl`
    write("prompts_unseen.jsonl", texts(row for row in train + held_out + rl if count(row)))
    tokenizer = AutoTokenizer.from_pretrained(reviews.folder("untrained"))
    for name, (hidden, layers, heads) in SIZES.items():
        config = LlamaConfig.from_pretrained(reviews.folder("untrained"))
        config.update(
            dict(
                hidden_size=hidden,
                intermediate_size=3 * hidden,
                num_hidden_layers=layers,
                head_dim=hidden // heads,
            )
        )
        config.update(dict(num_attention_heads=heads, num_key_value_heads=heads))
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(out / f"size-{name}")
        tokenizer.save_pretrained(out / f"size-{name}")


def require_sound(out: Path, seeds: list[int], jobs: Iterable[str]) -> None:
    """Ends with an error where the tables are of an installation that does not work: the SFT policy cannot write, or DVPO did not
    raise the reward."""
    from assets import reviews

    judged = [("sft", out / "sft", 0.0)]
    judged += [
        (f"dvpo, seed {seed}", report.home(out, seed, "dvpo"), 1.0) for seed in seeds if "dvpo" in jobs
    ]
    for name, folder, rise in judged:
        if (folder / "metrics.jsonl").exists():
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            rows = [row for row in rows if "eval/reward" in row]
            problem = reviews.unsound(rows[0] if rise else rows[-1], rows[-1], rise)
            if problem:
                sys.exit(
                    f"error: this installation does not work: {name}: {problem}; the tables above mean nothing"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[*report.TABLES], help="these tables and what they need")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="runs at a time; timed runs are always alone"
    )
    parser.add_argument("--out", type=Path, help="default: runs/tables")
    parser.add_argument("--docs", type=Path, help="folder of results.md, where tables stand between marks")
    parser.add_argument("--write-data", action="store_true", help=argparse.SUPPRESS)  # the job `data`
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_data:
        return write_data(args.run_dir)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    out = args.out or Path("runs/tables-quick" if args.quick else "runs/tables")
    seeds, names = args.seeds or ([0] if args.quick else [0, 1, 2]), args.only or list(report.TABLES)
    jobs, timed = commands(args.quick), []
    shared = {"data", "sft"} | {f"sft_{size}" for size in SIZES}
    needed = dict.fromkeys(job for name in names for job in report.TABLES[name][1])
    Jobs(out, jobs, [(seed, job) for seed in seeds for job in needed], shared).run(args.workers)
    if "cost" in names:
        for n in range(1 if args.quick else 5):
            for job in ("ppo", "dvpo", "grpo", "remax"):
                words, name = [*jobs[job]], f"timed_{job}_{n}"
                words[words.index("--steps") + 1], words[words.index("--eval-every") + 1] = "6", "0"
                jobs[name] = words
                timed.append((seeds[0], name))
        Jobs(out, jobs, timed, shared).run(1)
    report.write(out, seeds, names, args.docs)
    if not args.quick:  # else there are too few steps to learn it
        require_sound(out, seeds, needed)


if __name__ == "__main__":
    main()
