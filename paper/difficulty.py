"""Does V(s_1) say which prompts GRPO can learn from?

A group whose answers all have one reward teaches GRPO nothing. V(s_1), what a GVM expects of a prompt before the
first token is written, costs one forward pass of the prompt; does choosing prompts by it leave fewer such groups?

    python evaluate.py responses --models POLICY --dataset prompts.jsonl --samples 8 --temperature 1 \\
        --reward paper.text_rewards:on_topic
    python paper/difficulty.py --model POLICY --scored runs/.../scored.jsonl

`--scored`: as many answers of the policy to each prompt as there are, each with a reward of 0 or 1. For each seed
a GVM learns from the answers to a share of the prompts. The other prompts are chosen from: those whose V(s_1) is
nearest to 1/2, or, as the price of knowing better, those whose first answers have a mean nearest to 1/2. Both
are judged by the answers that are left, the groups. Resumes where it was stopped; writes OUT/table-difficulty.md.
"""

import argparse
import json
import os
import random
import shlex
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import distributed
from common.batches import run_micro_batches
from common.data import prompt_key, read_rows
from common.models import load_model
from common.pretrained import resolve
from common.tables import markdown
from common.tokenization import load_tokenizer, tokenize
from common.value_heads import response_values
from paper.own_policies import about_prompt
from paper.report import minus, spread, verdict
from tools.jobs import Jobs

# --- the data -----------------------------------------------------------------------------------------------


def write_data(args: argparse.Namespace) -> None:
    """train.jsonl and test.jsonl of the run folder: the answers, split by prompt."""
    prompts = list(by_prompt(read_answers(args.scored, args.reward)).values())
    random.Random(args.data_seed).shuffle(prompts)
    number = round(len(prompts) * args.test_share)
    if not 0 < number < len(prompts):
        sys.exit(f"error: {args.scored}: {len(prompts)} prompts are too few to be split by --test-share")
    for part, groups in {"test": prompts[:number], "train": prompts[number:]}.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for group in groups for row in group]
        (args.run_dir / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{part}: {len(groups)} prompts")


def read_answers(file: Path, reward: str | None) -> list[dict]:
    """Prompt, response and reward of each answer. `reward`: the one of this name in `rewards`, in place of
    `reward`. Ends where a reward is neither 0 nor 1. Prompts with fewer answers than others are left out and
    counted: an empty answer is a bad row."""
    rows = []
    for row in read_rows(str(file), "scored", skip_bad_rows=True):
        number = row["reward"]
        if reward:
            if reward not in row.get("rewards", {}):
                sys.exit(f"error: {file}, row {row['row']}: no {reward!r} in 'rewards'")
            number = row["rewards"][reward]
        if number not in (0, 1):
            sys.exit(f"error: {file}, row {row['row']}: its reward is {number}; it must be 0 or 1")
        about = about_prompt(row)  # what a template may read besides, tools for instance
        kept = {key: row[key] for key in ("prompt", "response", "truncated") if key in row}
        rows.append(about | kept | {"reward": number})
    groups = by_prompt(rows).values()
    most = max(map(len, groups))
    if most < 2:
        sys.exit(f"error: {file}: one answer to each prompt; give two at least")
    whole = [group for group in groups if len(group) == most]
    if len(whole) < len(groups):
        print(f"{len(groups) - len(whole)} of {len(groups)} prompts have fewer than {most} answers: left out")
    return [row for group in whole for row in group]


def by_prompt(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each prompt."""
    groups = {}
    for row in rows:
        groups.setdefault(prompt_key(row["prompt"]), []).append(row)
    return groups


# --- what is measured ---------------------------------------------------------------------------------------


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """All jobs by name. tools/jobs.py says what the braces mean."""
    lengths = ["--max-prompt-length", str(args.max_prompt_length)]
    lengths += ["--max-response-length", str(args.max_response_length)]
    jobs = {}
    jobs["data"] = ["paper/difficulty.py", "--write-data", "--scored", str(args.scored)]
    jobs["data"] += ["--data-seed", "{seed}", "--test-share", str(args.test_share)]
    if args.reward:
        jobs["data"] += ["--reward", args.reward]
    jobs["gvm"] = ["gvm_td.py", "--model", args.model, "--layers", str(args.layers), *lengths]
    jobs["gvm"] += ["--dataset", "{home}/data/train.jsonl", "--source", "scores", "--eval-every", "0"]
    jobs["gvm"] += ["--save-every", "0", "--overwrite", "--seed", "{seed}", *shlex.split(args.gvm_flags)]
    jobs["values"] = ["paper/difficulty.py", "--measure", "--scored", "{home}/data/test.jsonl", *lengths]
    jobs["values"] += ["--model", "{home}/gvm/model"]
    return jobs


def measure(args: argparse.Namespace) -> None:
    """difficulty.json of the run folder: of each prompt V(s_1), in the unit of the rewards, and its rewards."""
    rows = read_rows(str(args.scored), "scored")
    groups = by_prompt(rows)
    folder = resolve(args.model, "value")
    tokenizer = load_tokenizer(folder, {})
    first_answers = [group[0] for group in groups.values()]  # V(s_1) comes before any of them
    limits = (args.max_prompt_length, args.max_response_length)
    asked = tokenize(first_answers, tokenizer, ("response",), *limits, str(args.scored), False)
    sequences = [(row["prompt_ids"], row["response_ids"]) for row in asked]
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    options = SimpleNamespace(precision=args.precision, shard_size=args.shard_size, lora_rank=0)
    gvm = load_model("value", folder, tokenizer, options, trained=False, longest=longest)

    def forward(mb: dict):
        return response_values(gvm, **mb)  # [b, T + 1]

    width = 1 + max(len(response) for _, response in sequences)
    values = run_micro_batches(forward, sequences, 16, tokenizer.pad_token_id, width)  # [N, T + 1]
    at_prompt = values[:, 0].tolist()  # [N], V(s_1)
    found = []
    for row, value in zip(asked, at_prompt, strict=True):  # a prompt that is too long is not among them
        expected = value * gvm.config.return_std + gvm.config.return_mean
        group = groups[prompt_key(row["prompt"])]
        found.append({"value": expected, "rewards": [answer["reward"] for answer in group]})
    (args.run_dir / "difficulty.json").write_text(json.dumps(found))


# --- the table ----------------------------------------------------------------------------------------------

CHOICES = {
    "any": "any",
    "value": "V(s_1) nearest to 1/2",
    "pilot": "the mean of {pilot} answers nearest to 1/2",
}


def chosen(prompts: list[dict], choice: str, keep: float) -> list[dict]:
    """The share `keep` of the prompts by a choice; "any" are all of them."""
    if choice == "any":
        return prompts
    if choice == "value":
        ranked = sorted(prompts, key=lambda prompt: abs(prompt["value"] - 0.5))
    else:
        ranked = sorted(prompts, key=lambda prompt: abs(statistics.fmean(halves(prompt)[0]) - 0.5))
    return ranked[: max(1, round(len(prompts) * keep))]


def halves(prompt: dict) -> tuple[list[float], list[float]]:
    """(the first answers' rewards, which may choose; the others', the group that is judged)."""
    middle = len(prompt["rewards"]) // 2
    return prompt["rewards"][:middle], prompt["rewards"][middle:]


def flat_share(prompts: list[dict]) -> float:
    """The share of the groups whose rewards are all the same."""
    return statistics.fmean(len(set(halves(prompt)[1])) == 1 for prompt in prompts)


def correlation(prompts: list[dict]) -> float:
    """Of V(s_1) with the mean reward of the answers; nan where one of them is constant."""
    means = [statistics.fmean(prompt["rewards"]) for prompt in prompts]
    values = [prompt["value"] for prompt in prompts]
    if np.std(means) == 0 or np.std(values) == 0:
        return float("nan")
    return float(np.corrcoef(values, means)[0, 1])


def report(found: list[list[dict]], keep: float) -> str:
    """The table over seeds and what V(s_1) saves; `found`: the prompts of each seed."""
    first, group = (len(half) for half in halves(found[0][0]))
    flat = {choice: [flat_share(chosen(prompts, choice, keep)) for prompts in found] for choice in CHOICES}
    rows = []
    for choice, label in CHOICES.items():
        means = []
        for prompts in found:
            rewards = [statistics.fmean(halves(prompt)[1]) for prompt in chosen(prompts, choice, keep)]
            means.append(statistics.fmean(rewards))
        asked = {"any": 0, "value": 0, "pilot": first}[choice]
        rows.append([label.format(pilot=first), asked, spread(flat[choice], 3), spread(means, 3)])
    head = ["prompts", "answers that choosing costs", f"groups of {group} without spread", "mean reward"]
    numbers = [len(prompts) for prompts in found]
    lines = [
        markdown(head, rows),
        "",
        f"{min(numbers)} prompts to choose from, {keep:.0%} of them chosen; {len(found)} seeds.",
        f"Correlation of V(s_1) with the mean reward of a prompt: {spread(list(map(correlation, found)), 3)}.",
    ]
    for choice in ("value", "pilot"):
        saved = verdict(minus(flat["any"], flat[choice]))
        lines.append(f"Fewer groups without spread, {choice} against any: {saved}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="backbone of the GVM: folder or hub id")
    parser.add_argument("--layers", type=int, default=0, help="keep its first N layers; 0: all")
    parser.add_argument(
        "--scored", type=Path, required=True, help="answers with rewards, several to a prompt"
    )
    parser.add_argument("--reward", help="name in the answers' `rewards`; default: their `reward`")
    parser.add_argument("--test-share", type=float, default=0.5, help="of the prompts, to choose from")
    parser.add_argument("--keep", type=float, default=0.5, help="share of those that is chosen")
    parser.add_argument("--max-prompt-length", type=int, default=128, help="tokens")
    parser.add_argument("--max-response-length", type=int, default=32, help="tokens")
    parser.add_argument("--gvm-flags", default="--lr 1e-4 --batch-size 32", help="options of gvm_td.py")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="split, order and GVM of each"
    )
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/difficulty"), help="all runs lie in it")
    parser.add_argument("--write-data", action="store_true", help=argparse.SUPPRESS)  # the job `data`
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # the job `values`
    parser.add_argument("--data-seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_data:
        write_data(args)
        return
    if args.measure:
        args.seed = 0
        args.timeout_minutes = 60.0
        args.shard_size = 0
        args.precision = "auto"
        distributed.launch(measure, args)
        return
    if not args.model or not 0 < args.test_share < 1 or not 0 < args.keep < 1:
        sys.exit("error: give --model, and --test-share and --keep between 0 and 1")
    read_answers(args.scored, args.reward)  # what cannot be read is said before anything runs
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    args.scored = args.scored.resolve()
    Jobs(args.out, commands(args), [(seed, "values") for seed in args.seeds], set()).run(args.workers)
    found = []
    for seed in args.seeds:
        found.append(json.loads((args.out / f"seed{seed}" / "values" / "difficulty.json").read_text()))
    text = report(found, args.keep)
    (args.out / "table-difficulty.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
