"""Value models on your own model and data: GVM against reward model, PPO's critic and length; with 0, 1 and 3 context pairs; on
policies of training and on others.

    python paper/real_values.py --model SmolLM2-135M-Instruct --layers 4 --scored scored.jsonl.gz --pairs pairs.jsonl.gz \\
        --held-out claude-2.1_concise jina-chat --max-characters 300 --steps 100

`--scored` needs prompt, response, reward and policy, `--pairs` prompt, chosen, rejected; both a `split` column (train, test) by
prompt. `--critic` adds the critic of a PPO run to the table. Resumes where it was stopped; writes OUT/table-real.md.
"""

import argparse
import gzip
import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.data import read_rows
from paper.report import COLUMNS, accuracy, markdown, spread, verdict
from tools.jobs import Jobs


def write_data(args) -> None:
    """Rows and pairs of short responses: by known policies to train on, by known and by held-out ones to judge."""

    out = args.run_dir

    def write(name, rows):
        with gzip.open(out / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(
                json.dumps({key: value for key, value in row.items() if key != "row"}) + "\n" for row in rows
            )
        print(f"{name}: {len(rows)} rows")

    def pairs(rows, most):
        """Pairs of responses to a prompt, --gap apart; at most so many of a prompt, so that none counts for much more."""
        groups, chosen = {}, []
        for row in rows:
            groups.setdefault(json.dumps(row["prompt"]), []).append(row)
        for group in groups.values():
            found = [(a, b) for a in group for b in group if a["reward"] - b["reward"] >= args.gap]
            chosen += random.Random(0).sample(found, min(most, len(found)))
        who = lambda a, b: {"chosen_policy": a["policy"], "rejected_policy": b["policy"]}
        return [
            {"prompt": a["prompt"], "chosen": a["response"], "rejected": b["response"], **who(a, b)}
            for a, b in chosen
        ]

    short = lambda row: (
        len(row["response"]) <= args.max_characters and len(row["prompt"]) <= args.max_characters
    )
    train, test = (
        [row for row in read_rows(str(args.scored), "scored", split=s) if short(row)]
        for s in ("train", "test")
    )
    known = lambda rows: [row for row in rows if row["policy"] not in args.held_out]
    strange = [row for row in train + test if row["policy"] in args.held_out]
    write("known", known(train))
    write("known_train_pairs", pairs(known(train), 2))
    write("known_test_pairs", pairs(known(test), 8))
    if args.held_out:  # their answers to training prompts count too: no answer of theirs was trained on
        write("all", train)
        write("all_test_pairs", pairs(test, 8))
        write("strange_pairs", pairs(strange, 8))


def commands(args) -> tuple[dict[str, list[str]], list[str]]:
    """All jobs by name, and those that judge."""
    lengths = f"--max-prompt-length {args.max_prompt_length} --max-response-length {args.max_response_length}".split()
    lengths += ["--micro-batch-size", "8"]
    start = [
        "--model",
        args.model,
        "--layers",
        str(args.layers),
        "--lr",
        str(args.lr),
        "--epochs",
        str(args.epochs),
        *lengths,
    ]
    start += ["--batch-size", str(args.batch_size)]
    start += "--seed {seed} --eval-every 0 --save-every 0 --overwrite".split()
    flags = ["--scored", str(args.scored), "--held-out", *args.held_out, "--gap", str(args.gap)]
    data = ["paper/real_values.py", "--write-data", *flags, "--max-characters", str(args.max_characters)]
    jobs, judging = {"data": data}, []
    judge = ["evaluate.py", "values", "--draw", "0", "--seed", "{seed}", *lengths]
    for who in ("known", "all") if args.held_out and args.all_policies else ("known",):
        file, test = f"{{out}}/data/{who}.jsonl.gz", f"{{out}}/data/{who}_test_pairs.jsonl.gz"
        for k in args.context_pairs:
            jobs[f"{who}_{k}"] = [
                "gvm_td.py",
                *start,
                "--dataset",
                file,
                "--source",
                "scores",
                "--context-pairs",
                str(k),
                "--context-length",
                "64",
                "--eval-dataset",
                test,
                "--eval-split",
                "train",
                "--eval-source",
                "preference",
            ]
        models = [f"{{home}}/{who}_{k}/model" for k in args.context_pairs]
        if who == "known":
            pairs = [
                "--dataset",
                "{out}/data/known_train_pairs.jsonl.gz",
                "--eval-dataset",
                test,
                "--eval-split",
                "train",
            ]
            jobs["reward"] = ["reward.py", *start, *pairs]
            models += ["{home}/reward/model", *([args.critic] if args.critic else [])]
        for pairs in (f"{who}_test_pairs", *["strange_pairs"] * (who == "known" and bool(args.held_out))):
            jobs[f"judged_{pairs}"] = [
                *judge,
                "--dataset",
                f"{{out}}/data/{pairs}.jsonl.gz",
                "--models",
                *models,
            ]
            judging.append(f"judged_{pairs}")
    return jobs, judging


def report(args, seeds: list[int], judging: list[str]) -> str:
    titles = {
        "judged_known_test_pairs": "new prompts, the policies of training",
        "judged_strange_pairs": "policies that training has not seen",
        "judged_all_test_pairs": "new prompts, trained on all policies",
    }
    parts = []
    for job in judging:
        found = [accuracy(args.out, seed, job) for seed in seeds]
        rows, pairs = [], next(iter(found[0].values()))["all"]["pairs"]
        for name in found[0]:
            shares = {key: [f[name]["all"][key] for f in found if key in f[name]["all"]] for key in COLUMNS}
            cells = [spread(shares[key], 3) if shares[key] else "" for key in COLUMNS]
            label = (
                name.removesuffix("/model")
                .replace("known_", "GVM, context pairs ")
                .replace("all_", "GVM, context pairs ")
            )
            rows.append([label.replace("reward", "scalar reward model"), *cells])
        lines, mean = [], lambda k: [f[f"{job_of}_{k}/model"]["all"]["mean"] for f in found]
        job_of = "all" if "all" in job else "known"
        for k in args.context_pairs[1:]:
            lines.append(
                f"{k} context pairs over none: {verdict([a - b for a, b in zip(mean(k), mean(0), strict=True)])}."
            )
        parts.append(
            f"**{titles[job]}**: {pairs} pairs\n\n{markdown(['', *COLUMNS], rows)}\n\n" + " ".join(lines)
        )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="backbone of all: folder or hub id")
    parser.add_argument("--layers", type=int, default=0, help="keep its first N layers; 0: all")
    parser.add_argument("--scored", type=Path, required=True)
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
    parser.add_argument("--max-prompt-length", type=int, default=128)
    parser.add_argument("--max-response-length", type=int, default=96)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--write-data", action="store_true", help=argparse.SUPPRESS)  # the job `data`
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_data:
        return write_data(args)
    if not args.model or args.context_pairs[0]:
        sys.exit("error: give --model, and 0 as the first of --context-pairs")
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    jobs, judging = commands(args)
    Jobs(args.out, jobs, [(seed, job) for seed in args.seeds for job in judging], {"data"}).run(args.workers)
    text = report(args, args.seeds, judging)
    (args.out / "table-real.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
