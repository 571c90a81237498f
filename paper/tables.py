"""The tables and pictures of 2502.16944 (DVPO) and 2506.13702 (RPO), as far as they can be made, on the
embedded world.

    python paper/tables.py                      # make tables: everything, 3 seeds, about an hour on 2 cores
    python paper/tables.py --quick              # make tables QUICK=1: one seed, a tenth of the steps
    python paper/tables.py --only beta          # one table and what it needs
    python paper/tables.py --docs docs          # also puts tables and pictures into docs/results/

Resumes where it was stopped. All runs lie below runs/tables (commands in their job.json), tables there as
table-*.md. Each table has a column with the paper's figure or claim, on its own models, and one that says
whether it holds here: by the 95 % t interval of the difference, paired by seed.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.data import hold_out, prompt_hash, read_rows
from paper import report
from tools.jobs import Jobs

KNOWN = ("critic", "regular", "tourist")  # authors that a value model has read
OTHERS = ("grump", "poet")  # authors that it has not
UNSEEN = ("salad", "coffee", "waiter", "music")  # dishes in no offline row; the SFT policy knows the words


class Size(NamedTuple):
    """Of a model of the embedded world that is not its usual one."""

    hidden: int
    layers: int
    heads: int


SIZES = {  # by the name in the jobs
    "16": Size(hidden=16, layers=2, heads=1),
    "32": Size(hidden=32, layers=2, heads=2),
    "128": Size(hidden=128, layers=3, heads=4),
    "192": Size(hidden=192, layers=3, heads=4),
}

# Words of commands. tools/jobs.py says what the braces mean.
VALUE = ["--model", "{out}/sft/model", "--seed", "{seed}"]
RL = [*VALUE, "--eval-every", "3"]
OFFLINE = [*VALUE, "--eval-every", "30"]
# a file has no defaults of the embedded world
WORLD = ["--max-prompt-length", "16", "--max-response-length", "32", "--micro-batch-size", "64"]
REWARDS = ["assets.reviews:reward", "assets.reviews:grammatical"]
WARM = ["--warmup-steps", "20", "--no-precompute-ref"]
METHODS = {  # offline: script and flags on a file, as the embedded world's defaults have them
    "sft": ["sft.py", "--lr", "1e-3"],
    "kto": ["kto.py", "--lr", "3e-4", "--threshold", "0", "--desirable-weight", "2.1", *WARM],
    "dro": ["dro.py", "--lr", "3e-5", "--value-lr", "3e-3", "--tau", "0.3", *WARM],
    "rpo": ["rpo.py", "--lr", "1e-3", "--tau", "0.3", *WARM],
    "dpo": ["dpo.py", "--lr", "1e-4", "--beta", "0.5", *WARM],
}
ABLATIONS = {  # of RPO: job and flags
    "tau_01": ["--tau", "0.1"],
    "tau_1": ["--tau", "1"],
    "no_partition": ["--partition", "none"],
    "no_partition_normalised": ["--partition", "none", "--length-normalise"],
    "keep_75": ["--keep-responses", "0.75"],
    "keep_50": ["--keep-responses", "0.5"],
    "keep_25": ["--keep-responses", "0.25"],
    "noise_01": ["--reward-noise", "0.1"],
    "noise_05": ["--reward-noise", "0.5"],
    "noise_10": ["--reward-noise", "1.0"],
}


# --- the commands -------------------------------------------------------------------------------------------


def commands(quick: bool) -> dict[str, list[str]]:
    """All jobs by name; tools/jobs.py says what the braces mean. `quick`: a tenth of the steps."""

    def steps(number: int) -> list[str]:
        if quick:
            number = max(3, number // 10)
        return ["--steps", str(number), "--save-every", "0", "--overwrite"]

    jobs = {}
    # 2502.16944: one SFT policy, reward models and value models from it, and what is trained with them
    reward = ["--reward", "{home}/reward/model"]
    gvm_scores = ["--gvm", "{home}/gvm_scores/model"]
    gvm_pairs = ["--gvm", "{home}/gvm_pairs/model"]
    jobs["sft"] = ["sft.py", *steps(500)]
    jobs["reward"] = ["reward.py", *VALUE, *steps(200)]
    jobs["gvm_scores"] = ["gvm_td.py", *VALUE, *reward, *steps(500)]
    jobs["gvm_pairs"] = ["gvm_td.py", *VALUE, "--source", "preference", *steps(500)]
    jobs["gvm_true"] = ["gvm_td.py", *VALUE, *steps(500)]
    jobs["ppo"] = ["ppo.py", *RL, *reward, *steps(30)]
    jobs["dvpo"] = ["dvpo.py", *RL, *gvm_scores, *steps(30)]
    jobs["dvpo_pairs"] = ["dvpo.py", *RL, *gvm_pairs, *steps(30)]
    jobs["grpo"] = ["grpo.py", *RL, *reward, *steps(30)]
    jobs["remax"] = ["remax.py", *RL, *reward, *steps(30)]
    jobs["dpo"] = ["dpo.py", *OFFLINE, *steps(300)]
    jobs["dvpo_beta_005"] = ["dvpo.py", *RL, *gvm_scores, "--beta", "0.05", *steps(30)]
    jobs["dvpo_beta_001"] = ["dvpo.py", *RL, *gvm_scores, "--beta", "0.01", *steps(30)]

    # value models trained on some authors, judged on others
    known = ["--dataset", "{out}/data/known_pairs.jsonl", "--eval-fraction", "0.1", "--split-seed", "1"]
    known += ["--batch-size", "64", *WORLD]
    judge = ["evaluate.py", "values", "--draw", "0", *WORLD, "--models"]
    judge += ["{home}/gvm_known/model", "{home}/reward_known/model", "{home}/ppo_known/critic"]
    jobs["data"] = ["paper/tables.py", "--write-data"]
    jobs["gvm_known"] = ["gvm_td.py", *VALUE, *known, "--lr", "3e-3", *steps(500)]
    jobs["reward_known"] = ["reward.py", *VALUE, *known, "--lr", "2e-3", *steps(200)]
    jobs["ppo_known"] = ["ppo.py", *RL, "--reward", "{home}/reward_known/model", *steps(30)]
    jobs["judged_in"] = [*judge, "--dataset", "{out}/data/in_pairs.jsonl"]
    jobs["judged_out"] = [*judge, "--dataset", "{out}/data/out_pairs.jsonl"]
    jobs["judged"] = ["evaluate.py", "values", "--like", "{home}/gvm_pairs", "--models"]
    jobs["judged"] += ["{home}/gvm_pairs/model", "{home}/gvm_true/model", "{home}/gvm_scores/model"]
    jobs["judged"] += ["{home}/reward/model", "{home}/ppo/critic", "--draw", "0"]

    # 2506.13702: all on the same scored responses
    jobs["offline_sft"] = ["sft.py", *OFFLINE, "--part", "value", "--lr", "1e-3", *steps(300)]
    jobs["kto"] = ["kto.py", *OFFLINE, *steps(300)]
    jobs["dro"] = ["dro.py", *OFFLINE, *steps(300)]
    jobs["rpo"] = ["rpo.py", *OFFLINE, *steps(300)]
    # SFT has no reference: the first evaluation of rpo.py measures it
    measured = ["--model", "{home}/offline_sft/model", "--ref-model", "{out}/sft/model", "--lr", "1e-12"]
    jobs["offline_sft_measured"] = ["rpo.py", *measured, *steps(1)]

    # value models of other sizes
    for name in SIZES:
        lr = ["--lr", f"{0.192 / int(name):.1e}"]  # 1 / width, 3e-3 at 64
        jobs[f"sft_{name}"] = ["sft.py", "--model", f"{{out}}/data/size-{name}", *lr, *steps(500)]
        start = ["--model", f"{{out}}/sft_{name}/model", "--seed", "{seed}", "--source", "preference"]
        jobs[f"gvm_{name}"] = ["gvm_td.py", *start, *lr, *steps(500)]

    for name in ("kto", "dro", "rpo", "dpo"):
        jobs[f"{name}_normalised"] = [*jobs[name], "--length-normalise"]
    seen = [f"seen_{method}" for method in METHODS]
    jobs["measured"] = measure("prompts", ["dpo", "remax", "grpo", "ppo", "dvpo", "dvpo_pairs"])
    jobs["measured_seen"] = measure("prompts_seen", seen)
    jobs["measured_unseen"] = measure("prompts_unseen", seen)
    for name, flags in ABLATIONS.items():
        jobs[f"rpo_{name}"] = [*jobs["rpo"], *flags]

    # the offline methods on rows without some dishes
    split = ["--eval-fraction", "0.05", "--split-seed", "1", "--eval-prompts", "32"]
    for name, flags in METHODS.items():
        dataset = ["--dataset", "{out}/data/seen.jsonl"]
        size = ["--batch-size", "64"]
        if name == "dpo":  # pairs, each as long as two responses
            dataset = ["--dataset", "{out}/data/seen_pairs.jsonl"]
            size = ["--batch-size", "32"]
        rewards = ["--eval-reward", *REWARDS]
        jobs[f"seen_{name}"] = [*flags, *OFFLINE, *dataset, *split, *WORLD, *size, *rewards, *steps(300)]
    return jobs


def measure(prompts: str, models: list[str]) -> list[str]:
    """The command that samples and judges responses of the SFT policy and of `models` to a file of
    prompts."""
    paths = ["{out}/sft/model"]
    names = ["before"]
    for model in models:
        paths.append(f"{{home}}/{model}/model")
        names.append(model.removeprefix("seen_"))
    words = ["evaluate.py", "responses", *WORLD, "--temperature", "1", "--batch-size", "256", "--overwrite"]
    words += ["--seed", "{seed}", "--reward", *REWARDS, "--dataset", f"{{out}}/data/{prompts}.jsonl"]
    return [*words, "--models", *paths, "--names", *names]


def timed(words: list[str]) -> list[str]:
    """A command with 6 steps and without evaluations, for the table of costs."""
    words = list(words)
    words[words.index("--steps") + 1] = "6"
    words[words.index("--eval-every") + 1] = "0"
    return words


# --- the data -----------------------------------------------------------------------------------------------


def write_data(out: Path) -> None:
    """Pairs by some authors and by others, rows without some dishes, prompts, and untrained models of other
    sizes."""
    train, held_out = hold_out(read_rows("reviews", "prompts", part="value"), 0.2, 0)
    write_rows(out / "known_pairs.jsonl", neighbours(new_reviews(train, KNOWN)))
    write_rows(out / "in_pairs.jsonl", neighbours(new_reviews(held_out, KNOWN)))
    write_rows(out / "out_pairs.jsonl", neighbours(new_reviews(held_out, OTHERS)))

    scored, _ = hold_out(read_rows("reviews", "scored", part="value"), 0.2, 0)
    seen = []
    for row in scored:
        if not names_unseen(row["prompt"]) and not names_unseen(row["response"]):  # nor in a remark
            seen.append({key: row[key] for key in ("prompt", "response", "reward", "policy")})
    write_rows(out / "seen.jsonl", seen)
    write_rows(out / "seen_pairs.jsonl", neighbours(seen))

    # in the order in which the online scripts hold out prompts: the first 96 are those that no script trains
    # on
    rl = sorted(read_rows("reviews", "prompts", part="rl"), key=lambda row: prompt_hash(row["prompt"], 1))
    write_prompts(out / "prompts.jsonl", held_out + rl[:96])
    # no offline script reads the part `rl`, so all of it is new to them
    new_to_offline = held_out + rl
    seen_prompts = [row for row in new_to_offline if not names_unseen(row["prompt"])]
    unseen_prompts = [row for row in train + new_to_offline if names_unseen(row["prompt"])]
    write_prompts(out / "prompts_seen.jsonl", seen_prompts)
    write_prompts(out / "prompts_unseen.jsonl", unseen_prompts)
    write_models(out)


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_prompts(path: Path, rows: list[dict]) -> None:
    """The prompts of some rows and nothing else of them."""
    write_rows(path, [{"prompt": row["prompt"]} for row in rows])


def names_unseen(text: str) -> bool:
    """Whether a text names a dish that no offline row may name."""
    return bool(set(text.split()) & set(UNSEEN))


def new_reviews(prompts: list[dict], authors: tuple[str, ...]) -> list[dict]:
    """Sixteen reviews of each prompt, a random author each."""
    from assets import reviews

    rng = random.Random(2)
    rows = []
    for row in prompts:
        prompt = row["prompt"]
        for author in rng.choices(authors, k=16):
            response = reviews.write(author, prompt, rng)
            reward = reviews.reward([prompt], [response])[0]
            rows.append({"prompt": prompt, "response": response, "reward": reward, "policy": author})
    return rows


def neighbours(rows: list[dict]) -> Iterator[dict]:
    """Pairs of neighbouring responses to a prompt, as reviews.rows makes them."""
    from assets import reviews

    for row, next_row in zip(rows, rows[1:], strict=False):
        low, high = sorted((row, next_row), key=lambda row: row["reward"])
        gap = high["reward"] - low["reward"]
        if row["prompt"] != next_row["prompt"] or gap < reviews.MIN_GAP:
            continue
        yield {
            "prompt": row["prompt"],
            "chosen": high["response"],
            "rejected": low["response"],
            "subset": "clear" if gap >= 1.5 else "close",
            "chosen_policy": high["policy"],
            "rejected_policy": low["policy"],
        }


def write_models(out: Path) -> None:
    """Untrained models of other sizes than the embedded world's, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from assets import reviews

    folder = reviews.folder("untrained")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, size in SIZES.items():
        config = LlamaConfig.from_pretrained(folder)
        config.update(
            {
                "hidden_size": size.hidden,
                "intermediate_size": 3 * size.hidden,
                "num_hidden_layers": size.layers,
                "head_dim": size.hidden // size.heads,
                "num_attention_heads": size.heads,
                "num_key_value_heads": size.heads,
            }
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(out / f"size-{name}")
        tokenizer.save_pretrained(out / f"size-{name}")


# --- running ------------------------------------------------------------------------------------------------


def require_sound(out: Path, seeds: list[int], jobs: Iterable[str]) -> None:
    """Ends with an error where the tables are of an installation that does not work: the SFT policy cannot
    write, or DVPO did not raise the reward."""
    require_sound_run("sft", out / "sft", rise=0.0)
    if "dvpo" in jobs:
        for seed in seeds:
            require_sound_run(f"dvpo, seed {seed}", report.home(out, seed, "dvpo"), rise=1.0)


def require_sound_run(name: str, folder: Path, rise: float) -> None:
    """Ends with an error where a run's reward did not rise by `rise`; where that is 0, its last evaluation
    alone is judged."""
    from assets import reviews

    if not (folder / "metrics.jsonl").exists():
        return
    evaluations = report.curve(folder)
    last = evaluations[-1]
    before = evaluations[0] if rise else last
    problem = reviews.unsound(before, last, rise)
    if problem:
        what = "this installation does not work"
        sys.exit(f"error: {what}: {name}: {problem}; the tables above mean nothing")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[*report.TABLES], help="these tables and what they need")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2")
    parser.add_argument("--quick", action="store_true", help="one seed, a tenth of the steps")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="runs at a time; timed runs are always alone"
    )
    parser.add_argument("--out", type=Path, help="default: runs/tables")
    parser.add_argument("--docs", type=Path, help="folder of results.md, where tables stand between marks")
    parser.add_argument("--write-data", action="store_true", help=argparse.SUPPRESS)  # the job `data`
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_data:
        write_data(args.run_dir)
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    out = Path("runs/tables")
    seeds = [0, 1, 2]
    rounds = 5  # of the timed runs
    if args.quick:
        out = Path("runs/tables-quick")
        seeds = [0]
        rounds = 1
    if args.out:
        out = args.out
    if args.seeds:
        seeds = args.seeds
    names = args.only or list(report.TABLES)

    jobs = commands(args.quick)
    shared = {"data", "sft", *[f"sft_{size}" for size in SIZES]}  # what does not depend on the seed
    needed = list(dict.fromkeys(job for name in names for job in report.TABLES[name].jobs))  # each once
    wanted = [(seed, job) for seed in seeds for job in needed]
    Jobs(out, jobs, wanted, shared).run(args.workers)
    if "cost" in names:
        wanted = []
        for number in range(rounds):
            for job in ("ppo", "dvpo", "grpo", "remax"):
                name = f"timed_{job}_{number}"
                jobs[name] = timed(jobs[job])
                wanted.append((seeds[0], name))
        Jobs(out, jobs, wanted, shared).run(1)  # alone, or they would slow one another down
    report.write(out, seeds, names, args.docs)
    if args.quick:
        print("not judged: with --quick there are too few steps to tell whether the installation works")
    else:
        require_sound(out, seeds, needed)


if __name__ == "__main__":
    main()
