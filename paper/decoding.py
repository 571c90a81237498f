"""Decoding by value compared with plain sampling, and with DVPO by the same Global Value Model: reward, KL, time.

    python paper/decoding.py                # the embedded world, 3 seeds; each trains its own SFT, GVM and DVPO
    python paper/decoding.py --model SmolLM2-135M-Instruct --gvm runs/gvm_td/model --dataset prompts.jsonl \\
        --reward module:function --max-response-length 32 --prompts 64 --seeds 0

On your own model nothing is trained; `--trained` adds a policy to compare with. Resumes where it was stopped;
writes OUT/decoding.json (all numbers that the table is made of) and OUT/table-decoding.md.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import distributed
from common.data import hold_out_prompts, read_rows
from common.decoding import Guide, best_of, check_guide, guided
from common.models import load_model
from common.pretrained import resolve
from common.rollout import rollout
from common.tables import markdown
from common.tokenization import load_tokenizer, tokenize
from paper.report import final, half_interval, home, put_between_marks, spread
from tools.jobs import ROOT, Jobs

NOT_SHOWN = ("characters", "truncated", "distinct_2")

# --- the commands -------------------------------------------------------------------------------------------


def methods_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """Job -> the flags of `evaluate.py responses` that make it this method."""
    methods = {"plain": []}
    for count in args.best_of:
        methods[f"best_{count}"] = ["--decode", "best-of", "--best-of", str(count)]
    for guide in args.guides:
        candidates, beta = guide.split(":")
        name = f"guided_{candidates}_{beta.replace('.', 'p')}"
        methods[name] = ["--decode", "guided", "--guide-candidates", candidates, "--guide-beta", beta]
    return methods


def label_of(name: str) -> str:
    """What a method is called in the table."""
    kind, *numbers = name.split("_")
    if kind == "best":
        return f"best of {numbers[0]}"
    if kind == "guided":
        beta = numbers[1].replace("p", ".").replace("inf", "∞")
        return f"guided, k {numbers[0]}, beta {beta}"
    return {"plain": "plain sampling", "trained": "the trained policy", "dvpo": "DVPO, the same GVM"}[kind]


def commands(args: argparse.Namespace) -> tuple[dict[str, list[str]], list[str]]:
    """All jobs by name, and those that measure. tools/jobs.py says what the braces mean."""
    jobs = {}
    lengths = []
    if args.model:
        model = args.model
        gvm = args.gvm
        trained = args.trained
        lengths = ["--max-prompt-length", str(args.max_prompt_length)]
        lengths += ["--max-response-length", str(args.max_response_length)]
        data = ["--dataset", args.dataset]
        data += ["--part", args.part]
    else:
        common = ["--seed", "{seed}", "--split-seed", "{seed}", "--save-every", "0", "--overwrite"]
        model = "{home}/sft/model"
        gvm = "{home}/gvm/model"
        trained = "{home}/dvpo/model"
        jobs["sft"] = ["sft.py", *common]
        jobs["gvm"] = ["gvm_td.py", "--model", model, *common]
        jobs["dvpo"] = ["dvpo.py", "--model", model, "--gvm", gvm, "--steps", "30", *common]
        jobs["dvpo"] += ["--eval-prompts", str(args.prompts)]
        data = ["--dataset", "reviews", "--split-seed", "{seed}"]
    data += ["--prompts", str(args.prompts), "--batch-size", str(args.batch_size)]
    measure = ["evaluate.py", "responses", *data, *lengths, "--samples", str(args.samples)]
    measure += ["--temperature", "1", "--seed", "{seed}"]
    if args.reward:
        measure += ["--reward", *args.reward]

    wanted = []
    for name, flags in methods_of(args).items():
        jobs[name] = [*measure, "--models", model, "--names", "policy", *flags]
        if name != "plain":
            jobs[name] += ["--gvm", gvm]
        wanted.append(name)
    if trained:
        jobs["trained"] = [*measure, "--models", trained, "--names", "policy"]
        wanted.append("trained")
    jobs["time"] = ["paper/decoding.py", "--time", "--model", model, "--gvm", gvm, *data, *lengths]
    jobs["time"] += ["--best-of", *map(str, args.best_of), "--guides", *args.guides]
    return jobs, wanted


# --- the cost -----------------------------------------------------------------------------------------------


def measure_time(args: argparse.Namespace) -> None:
    """Seconds (of a CPU, its own) and tokens of each method, in turns, on the same prompts; seconds.json of the run folder. The
    models are loaded once, and the first round is not counted."""
    options = SimpleNamespace(precision="auto", shard_size=0, lora_rank=0)
    folder = resolve(args.model)
    tokenizer = load_tokenizer(folder, {})
    part = "rl" if args.dataset == "reviews" else args.part
    rows = read_rows(args.dataset, "prompts", part=part, split_seed=args.split_seed)
    limit = args.max_response_length
    rows = tokenize(rows, tokenizer, (), args.max_prompt_length, limit, args.dataset, True)
    _, rows = hold_out_prompts(rows, args.prompts, args.split_seed)
    prompts = [row["opening_ids"] for row in rows][: args.batch_size]
    longest = max(map(len, prompts)) + limit
    policy = load_model("policy", folder, tokenizer, options, trained=False, longest=longest)
    gvm = load_model("value", resolve(args.gvm, "value"), tokenizer, options, trained=False, longest=longest)
    check_guide(gvm, args.gvm, tokenizer)

    def respond(name: str, seed: tuple[int, int]) -> list[list[int]]:
        """The responses of a method."""
        kind, *numbers = name.split("_")
        if kind == "plain":
            return rollout(policy, tokenizer, prompts, limit, 1.0, seed)[0]
        if kind == "best":
            found = best_of(policy, gvm, tokenizer, prompts, int(numbers[0]), limit, 1.0, seed, 8)
        else:
            guide = Guide(gvm, int(numbers[0]), float(numbers[1].replace("p", ".")), False)
            found = guided(policy, guide, tokenizer, prompts, limit, 1.0, seed)
        return [decoded.tokens for decoded in found]

    # On a CPU that others use too, the seconds of this process alone; a GPU's are not among those.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    measured = {name: [] for name in methods_of(args)}
    for number in range(args.rounds + 1):
        for name, rounds in measured.items():
            start = clock()
            responses = respond(name, (0, number))
            seconds = clock() - start
            if number > 0:
                rounds.append([round(seconds, 4), sum(map(len, responses))])
    (args.run_dir / "seconds.json").write_text(json.dumps(measured))


# --- the numbers and the table ------------------------------------------------------------------------------


def collect(args: argparse.Namespace, wanted: list[str]) -> dict:
    """All numbers that the table is made of: by method and seed the mean of each column, the first reward of
    each response, rounds of (seconds, tokens)."""
    methods = {}
    for name in wanted:
        methods[name] = []
        for seed in args.seeds:
            folder = home(args.out, seed, name)
            columns = json.loads((folder / "responses.json").read_text())["models"]["policy"]
            means = {column: round(found["mean"], 5) for column, found in columns.items()}
            if name == "trained" and not args.model:
                means["kl"] = round(final(args.out, seed, "dvpo", "eval/kl"), 5)
            scored = folder / "policy/scored.jsonl"
            rewards = []
            if scored.exists():
                rows = [json.loads(line) for line in scored.read_text(encoding="utf-8").splitlines()]
                rewards = [round(row["reward"], 4) for row in rows]
            methods[name].append({"means": means, "rewards": rewards})
    times = {}
    for seed in args.seeds:
        found = json.loads((home(args.out, seed, "time") / "seconds.json").read_text())
        for name, rounds in found.items():
            times.setdefault(name, []).append(rounds)
    # a seed's rewards are needed where there is one seed alone, to pair them by prompt
    if len(args.seeds) > 1:
        for found in methods.values():
            for of_seed in found:
                del of_seed["rewards"]
    world = not args.model
    return {"world": world, "seeds": args.seeds, "samples": args.samples, "methods": methods, "times": times}


def interval(differences: list[float]) -> str:
    """Mean ± half of the 95 % t interval, and whether it excludes 0."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.2f}"
    half = half_interval(differences)
    verdict = "" if abs(mean) > half else ", not separated"
    return f"{mean:+.2f} ± {half:.2f}{verdict}"


def differences_of(numbers: dict, name: str, against: str) -> list[float]:
    """Of the first reward, paired: by seed, or with one seed by prompt."""
    ours = numbers["methods"][name]
    theirs = numbers["methods"][against]
    column = first_reward(numbers)
    if len(ours) > 1:
        pairs = zip(ours, theirs, strict=True)
        return [one["means"][column] - other["means"][column] for one, other in pairs]
    samples = numbers["samples"]
    found = []
    rewards = ours[0]["rewards"]
    for start in range(0, len(rewards), samples):
        end = start + samples
        mine = statistics.fmean(rewards[start:end])
        found.append(mine - statistics.fmean(theirs[0]["rewards"][start:end]))
    return found


def first_reward(numbers: dict) -> str:
    """The name of the first reward's column: what comes after the columns that every run has."""
    columns = list(numbers["methods"]["plain"][0]["means"])
    return next(column for column in columns if column not in ("length", *NOT_SHOWN))


def seconds_ratios(numbers: dict, name: str) -> list[float]:
    """Seconds per response token kept, over plain sampling's of the same round; the median of each seed."""
    ratios = []
    for ours, plain in zip(numbers["times"][name], numbers["times"]["plain"], strict=True):
        of_rounds = []
        for (seconds, tokens), (plain_seconds, plain_tokens) in zip(ours, plain, strict=True):
            of_rounds.append((seconds / tokens) / (plain_seconds / plain_tokens))
        ratios.append(statistics.median(of_rounds))
    return ratios


def report(numbers: dict) -> str:
    """The table: a row per method."""
    reward = first_reward(numbers)
    columns = [column for column in numbers["methods"]["plain"][0]["means"] if column not in NOT_SHOWN]
    rows = []
    for name, found in numbers["methods"].items():
        label = label_of("dvpo" if name == "trained" and numbers["world"] else name)
        row = [label]
        for column in [*columns, "kl"]:
            known = [of_seed["means"][column] for of_seed in found if column in of_seed["means"]]
            row.append(spread(known) if known else "")
        row.append("" if name == "plain" else interval(differences_of(numbers, name, "plain")))
        ratio = spread(seconds_ratios(numbers, name), 1) if name in numbers["times"] else ""
        row.append(ratio)
        rows.append(row)
    head = ["", *columns, "kl", f"{reward} above plain", "seconds per token / plain's"]
    lines = [markdown(head, rows)]
    if "trained" in numbers["methods"]:
        parts = []
        for name in numbers["methods"]:
            if name not in ("plain", "trained"):
                parts.append(f"{label_of(name)}: {interval(differences_of(numbers, name, 'trained'))}")
        lines.append(f"{reward} above the trained policy: " + "; ".join(parts) + ".")
    return "\n\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="your policy: folder or hub id; none: the embedded world")
    parser.add_argument("--gvm", default="", help="your value model, from gvm_td.py")
    parser.add_argument("--trained", default="", help="a trained policy to compare with")
    parser.add_argument("--dataset", default="reviews", help="your prompts: hub id or file")
    parser.add_argument("--part", default="all", help="share of your prompts: all, sft, value or rl")
    parser.add_argument(
        "--reward", nargs="*", default=[], help="what judges; the first one has the intervals"
    )
    parser.add_argument("--prompts", type=int, default=96, help="number of prompts that are held out")
    parser.add_argument("--samples", type=int, default=4, help="responses to each prompt")
    parser.add_argument("--batch-size", type=int, default=96, help="responses at a time")
    parser.add_argument("--max-prompt-length", type=int, default=256, help="tokens")
    parser.add_argument("--max-response-length", type=int, default=32, help="tokens")
    parser.add_argument("--best-of", type=int, nargs="*", default=[4, 16], help="values of n")
    guides = ["8:inf", "8:1", "8:0.5", "8:0.2", "8:0.1", "32:inf", "32:0.5", "32:0.2"]
    parser.add_argument("--guides", nargs="*", default=guides, help="candidates:beta of each guided method")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing, besides the first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="everything is done for each")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/decoding"), help="all runs lie in it")
    parser.add_argument("--docs", type=Path, help="the folder docs/, into which numbers and table are put")
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)  # the job `time`
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--split-seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false"}
    if args.time:
        args.seed = 0
        args.timeout_minutes = 60.0
        args.shard_size = 0
        args.precision = "auto"
        distributed.launch(measure_time, args)
        return
    if args.model and not (args.gvm and args.dataset != "reviews" and args.reward):
        sys.exit("error: --model needs --gvm, --dataset and --reward")
    if not args.model:
        args.reward = ["assets.reviews:reward", "assets.reviews:grammatical"]
    # a --reward of yours (module:function) is found where you are
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), str(ROOT)])
    jobs, wanted = commands(args)
    measured = [(seed, name) for seed in args.seeds for name in [*wanted, "time"]]
    Jobs(args.out, jobs, measured, shared=set()).run(args.workers)
    numbers = collect(args, wanted)
    text = report(numbers)
    (args.out / "decoding.json").write_text(json.dumps(numbers))
    (args.out / "table-decoding.md").write_text(text, encoding="utf-8")
    if args.docs:
        (args.docs / "results/data/decoding.json").write_text(json.dumps(numbers) + "\n")
        put_between_marks([args.docs / "results/decoding.md"], "decoding", text)
    print(text)


if __name__ == "__main__":
    main()
