"""Value models on your own model and data: GVM against reward model, PPO's critic and length; with 0, 1 and 3
context pairs; on policies of training and on others.

    python paper/real_values.py --model SmolLM2-135M-Instruct --layers 4 --scored scored.jsonl.gz \\
        --held-out claude-2.1_concise jina-chat --max-characters 300

`--scored` needs prompt, response, reward and policy, and a `split` column (train, test) by prompt. `--critic`
adds the critic of a PPO run to the table. Resumes where it was stopped; writes OUT/table-real.md.
"""

import argparse
import gzip
import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.data import prompt_key, read_rows
from common.tables import markdown
from paper.report import STATISTICS, accuracy, minus, spread, verdict
from tools.jobs import Jobs

# --- the data -----------------------------------------------------------------------------------------------


def write_data(args: argparse.Namespace) -> None:
    """Rows and pairs of short responses: by known policies to train on, by known and by held-out ones to
    judge."""
    train = short_rows(args, "train")
    test = short_rows(args, "test")
    known_train = [row for row in train if row["policy"] not in args.held_out]
    known_test = [row for row in test if row["policy"] not in args.held_out]
    write_rows(args.run_dir, "known", known_train)
    write_rows(args.run_dir, "known_train_pairs", pairs_of(known_train, args.gap, most=2))
    write_rows(args.run_dir, "known_test_pairs", pairs_of(known_test, args.gap, most=8))
    if args.held_out:
        # their answers to training prompts count too: no answer of theirs was trained on
        strange = [row for row in train + test if row["policy"] in args.held_out]
        write_rows(args.run_dir, "all", train)
        write_rows(args.run_dir, "all_test_pairs", pairs_of(test, args.gap, most=8))
        write_rows(args.run_dir, "strange_pairs", pairs_of(strange, args.gap, most=8))


def short_rows(args: argparse.Namespace, split: str) -> list[dict]:
    """The scored rows of a split whose prompt and response have at most --max-characters each."""
    rows = []
    for row in read_rows(str(args.scored), "scored", split=split):
        longest = max(len(row["response"]), len(row["prompt"]))
        if longest <= args.max_characters:
            rows.append(row)
    return rows


def pairs_of(rows: list[dict], gap: float, most: int) -> list[dict]:
    """Pairs of responses to a prompt, `gap` apart; at most so many per prompt, so that none counts for much
    more."""
    groups = {}
    for row in rows:
        groups.setdefault(prompt_key(row["prompt"]), []).append(row)
    out = []
    for group in groups.values():
        found = []
        for better in group:
            for worse in group:
                if better["reward"] - worse["reward"] >= gap:
                    found.append((better, worse))
        for better, worse in random.Random(0).sample(found, min(most, len(found))):
            out.append(
                {
                    "prompt": better["prompt"],
                    "chosen": better["response"],
                    "rejected": worse["response"],
                    "chosen_policy": better["policy"],
                    "rejected_policy": worse["policy"],
                }
            )
    return out


def write_rows(folder: Path, name: str, rows: list[dict]) -> None:
    """A file of JSON lines, without the number that a row had in the data."""
    with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        for row in rows:
            kept = {key: value for key, value in row.items() if key != "row"}
            file.write(json.dumps(kept) + "\n")
    print(f"{name}: {len(rows)} rows")


# --- the commands -------------------------------------------------------------------------------------------


def commands(args: argparse.Namespace) -> tuple[dict[str, list[str]], list[str]]:
    """All jobs by name, and those that judge. tools/jobs.py says what the braces mean."""
    lengths = ["--max-prompt-length", str(args.max_prompt_length)]
    lengths += ["--max-response-length", str(args.max_response_length), "--micro-batch-size", "8"]
    start = ["--model", args.model, "--layers", str(args.layers)]
    start += ["--lr", str(args.lr), "--epochs", str(args.epochs), *lengths]
    start += ["--batch-size", str(args.batch_size)]
    start += ["--seed", "{seed}", "--eval-every", "0", "--save-every", "0", "--overwrite"]
    judge = ["evaluate.py", "values", "--draw", "0", "--seed", "{seed}", *lengths]

    jobs = {}
    judging = []
    jobs["data"] = ["paper/real_values.py", "--write-data", "--scored", str(args.scored)]
    jobs["data"] += ["--held-out", *args.held_out, "--gap", str(args.gap)]
    jobs["data"] += ["--max-characters", str(args.max_characters)]

    trained_on = ["known"]
    if args.held_out and args.all_policies:
        trained_on.append("all")
    for who in trained_on:
        test = ["--eval-dataset", f"{{out}}/data/{who}_test_pairs.jsonl.gz", "--eval-split", "train"]
        models = []
        for number in args.context_pairs:
            name = f"{who}_{number}"
            data = ["--dataset", f"{{out}}/data/{who}.jsonl.gz", "--source", "scores"]
            context = ["--context-pairs", str(number), "--context-length", "64"]
            jobs[name] = ["gvm_td.py", *start, *data, *context, *test, "--eval-source", "preference"]
            models.append(f"{{home}}/{name}/model")
        judged = [f"{who}_test_pairs"]
        if who == "known":
            data = ["--dataset", "{out}/data/known_train_pairs.jsonl.gz"]
            jobs["reward"] = ["reward.py", *start, *data, *test]
            models.append("{home}/reward/model")
            if args.critic:
                models.append(args.critic)
            if args.held_out:
                judged.append("strange_pairs")
        for pairs in judged:
            name = f"judged_{pairs}"
            jobs[name] = [*judge, "--dataset", f"{{out}}/data/{pairs}.jsonl.gz", "--models", *models]
            judging.append(name)
    return jobs, judging


# --- the table ----------------------------------------------------------------------------------------------

TITLES = {
    "judged_known_test_pairs": "new prompts, the policies of training",
    "judged_strange_pairs": "policies that training has not seen",
    "judged_all_test_pairs": "new prompts, trained on all policies",
}


def report(args: argparse.Namespace, seeds: list[int], judging: list[str]) -> str:
    """A table per job that judged: what share of the pairs each model judges rightly."""
    parts = []
    for job in judging:
        found = [accuracy(args.out, seed, job) for seed in seeds]
        number_of_pairs = next(iter(found[0].values()))["all"]["pairs"]
        rows = []
        for name in found[0]:
            row = [label_of(name)]
            for key in STATISTICS:
                shares = [tables[name]["all"][key] for tables in found if key in tables[name]["all"]]
                row.append(spread(shares, 3) if shares else "")
            rows.append(row)

        who = "all" if "all" in job else "known"
        without = [tables[f"{who}_0/model"]["all"]["mean"] for tables in found]
        lines = []
        for number in args.context_pairs[1:]:
            means = [tables[f"{who}_{number}/model"]["all"]["mean"] for tables in found]
            lines.append(f"{number} context pairs over none: {verdict(minus(means, without))}.")
        table = markdown(["", *STATISTICS], rows)
        parts.append(f"**{TITLES[job]}**: {number_of_pairs} pairs\n\n{table}\n\n" + " ".join(lines))
    return "\n\n".join(parts) + "\n"


def label_of(name: str) -> str:
    """What a model is called in the table, by the job that trained it."""
    label = name.removesuffix("/model")
    label = label.replace("known_", "GVM, context pairs ")
    label = label.replace("all_", "GVM, context pairs ")
    return label.replace("reward", "scalar reward model")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="backbone of all: folder or hub id")
    parser.add_argument("--layers", type=int, default=0, help="keep its first N layers; 0: all")
    parser.add_argument("--scored", type=Path, required=True, help="scored responses: hub id or file")
    parser.add_argument("--held-out", nargs="*", default=[], help="policies whose answers are not trained on")
    parser.add_argument(
        "--all-policies", action="store_true", help="also value models trained on all policies"
    )
    parser.add_argument("--context-pairs", type=int, nargs="+", default=[0, 1, 3], help="the first must be 0")
    parser.add_argument("--critic", help="critic of a PPO run, to be judged too")
    parser.add_argument(
        "--gap", type=float, default=2.0, help="smallest difference of rewards that makes a pair"
    )
    parser.add_argument("--max-characters", type=int, default=300, help="of prompt and of response")
    parser.add_argument("--max-prompt-length", type=int, default=128, help="tokens")
    parser.add_argument("--max-response-length", type=int, default=96, help="tokens")
    parser.add_argument("--lr", type=float, default=1e-4, help="of all that is trained")
    parser.add_argument("--epochs", type=int, default=2, help="of all that is trained")
    parser.add_argument("--batch-size", type=int, default=8, help="of all that is trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="everything is done for each")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="all runs lie in it")
    parser.add_argument("--write-data", action="store_true", help=argparse.SUPPRESS)  # the job `data`
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_data:
        write_data(args)
        return
    if not args.model or args.context_pairs[0]:
        sys.exit("error: give --model, and 0 as the first of --context-pairs")
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    jobs, judging = commands(args)
    wanted = [(seed, job) for seed in args.seeds for job in judging]
    Jobs(args.out, jobs, wanted, shared={"data"}).run(args.workers)
    text = report(args, args.seeds, judging)
    (args.out / "table-real.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
