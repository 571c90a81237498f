"""Semi-online DVPO: the policy's own answers are scored now and then, and the Global Value Model goes on from
them; compared with a frozen GVM and with PPO.

2502.16944 leaves this to future work: "periodically refreshing the GVM ... while controlling the update
frequency". For each seed: an SFT policy, a GVM from scored offline answers, then

    frozen       dvpo.py with that GVM, all --steps
    semi-online  dvpo.py for --refresh-every steps, which keeps its answers; gvm_td.py scores them by --reward and
                 goes on from the last GVM, on new and offline answers mixed; dvpo.py goes on from the last policy
                 (with the first reference and a fresh optimizer); and so on
    PPO          ppo.py with the same --reward, and the same with its critic started from the GVM

    python paper/semi_online.py                                 # the embedded world, 3 seeds
    python paper/semi_online.py --seeds 3 4                     # more of them: the report is over all
    python paper/semi_online.py --also-every 8 30 --also-old-share 0 0.8 1 --also-answers 960
    python paper/semi_online.py --model runs/sft/model --offline answers.jsonl --prompts prompts.jsonl \\
        --reward rewards:polite --steps 200 --refresh-every 50 --flags "--max-response-length 256"

`--offline` needs prompt and response; all of its answers are scored by `--reward` too. Rates and sizes are the
scripts' own: give yours by the `--flags` options. Resumes where it was stopped. Writes OUT/semi_online.json (the
numbers that the report is made of, added to what the file holds), semi_online.md and semi_online.png.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.tables import markdown
from paper.report import axes_of, half_interval, minus, put_between_marks, rounded, rows_of, spread
from tools.jobs import ROOT, Jobs

# on the embedded world, whose scripts have their own sizes for its data, but not for a file of its answers
EMBEDDED_REFRESH = "--part all --batch-size 64 --micro-batch-size 64 --max-prompt-length 16"
EMBEDDED_REFRESH += " --max-response-length 32 --lr 1.5e-3 --steps 200"  # half of the first GVM's rate


class Refreshing(NamedTuple):
    """How a semi-online run refreshes its GVM."""

    every: int
    """policy steps between two refreshes"""
    most: int
    """so many refreshes at most; after them the GVM stays as it is"""
    old_share: float
    """share of offline answers in what a refresh learns from; 1: it sees no new answer at all"""
    answers: int
    """so many of the newest answers are scored at each refresh; 0: all since the last"""

    def slug(self) -> str:
        """For names of folders, which tools/jobs.py wants of letters, digits and _."""
        return f"every{self.every}_most{self.most}_old{round(100 * self.old_share)}_answers{self.answers}"


class Method(NamedTuple):
    """A row of the table: the jobs that it consists of."""

    gvm: list[str]
    """the first GVM, where it has one"""
    refreshes: list[str]
    policies: list[str]
    """in their order: each goes on from the one before"""


# --- the commands -------------------------------------------------------------------------------------------


def stage_steps(steps: int, every: int, most: int) -> list[int]:
    """The policy steps before, between and after the refreshes: 60 steps, every 15, at most 2: 15, 15, 30."""
    stages = []
    while steps > every and len(stages) < most:
        stages.append(every)
        steps -= every
    return [*stages, steps]


def refreshings(args: argparse.Namespace) -> dict[str, Refreshing]:
    """The semi-online methods by their label: the one of the flags, then those in which one thing is another."""
    first = Refreshing(args.refresh_every, args.refreshes, args.old_share, args.answers)
    found = {"semi-online": first}
    for every in args.also_every:
        found[f"semi-online, every {every} steps"] = first._replace(every=every)
    for most in args.also_refreshes:
        found[f"semi-online, {most} refreshes"] = first._replace(most=most)
    for share in args.also_old_share:
        what = f"{share:.0%} offline answers" if share < 1 else "refreshed on offline answers alone"
        found[f"semi-online, {what}"] = first._replace(old_share=share)
    for answers in args.also_answers:
        found[f"semi-online, {answers} answers scored a refresh"] = first._replace(answers=answers)
    return found


def commands(args: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, Method]]:
    """All jobs by name, and the methods by label. tools/jobs.py says what the braces mean."""
    splits = ["--split-seed", "{seed}"]
    common = [*splits, "--save-every", "0", "--overwrite", *shlex.split(args.flags)]
    seed = ["--seed", "{seed}"]
    gvm_flags = ["--source", "scores", "--reward", args.reward, *common, *shlex.split(args.gvm_flags)]
    policy_flags = ["--dataset", args.prompts, "--eval-reward", args.reward, *args.measure]
    policy_flags += ["--eval-every", str(args.eval_every), *common, *shlex.split(args.rl_flags)]

    jobs = {}
    sft = args.model
    if args.model == "reviews":  # one of its own for each seed
        jobs["sft"] = ["sft.py", *seed, *common]
        sft = "{home}/sft/model"
    jobs["gvm"] = ["gvm_td.py", "--model", sft, "--dataset", args.offline, *seed, *gvm_flags]
    first_gvm = "{home}/gvm/model"
    all_steps = ["--steps", str(args.steps)]
    start = ["--model", sft, *seed, *policy_flags]
    jobs["frozen"] = ["dvpo.py", "--gvm", first_gvm, *start, *all_steps]
    jobs["ppo"] = ["ppo.py", "--reward", args.reward, *start, *all_steps]
    jobs["ppo_gvm"] = ["ppo.py", "--reward", args.reward, "--critic", first_gvm, *start, *all_steps]
    methods = {"frozen GVM": Method(["gvm"], [], ["frozen"])}

    for label, how in refreshings(args).items():
        stages = stage_steps(args.steps, how.every, how.most)
        # the first stage is the same whatever comes after it
        policy = f"start_{stages[0]}"
        keep = ["--save-rollouts", "--steps", str(stages[0])]
        jobs[policy] = ["dvpo.py", "--gvm", first_gvm, *start, *keep]
        method = Method(["gvm"], [], [policy])
        gvm = "gvm"
        for number, steps in enumerate(stages[1:], 1):
            # other prompts and random numbers than in the stage before: 10{seed}, 20{seed}, ...
            stage_seed = ["--seed", f"{number}0{{seed}}"]
            refreshed = f"gvm_{how.slug()}_{number}"
            words = ["gvm_td.py", "--model", f"{{home}}/{gvm}/model", *stage_seed, *gvm_flags]
            words += ["--eval-source", "scores", "--skip-bad-rows"]  # an empty answer is a bad row
            if how.old_share < 1:
                words += ["--dataset", f"{{home}}/{policy}/rollouts.jsonl", "--last-rows", str(how.answers)]
                words += ["--old-dataset", "{home}/gvm/scored.jsonl", "--old-share", str(how.old_share)]
            else:
                # its file holds no prompt that --split-seed holds out: hold out others
                words += ["--dataset", "{home}/gvm/scored.jsonl", "--split-seed", "1{seed}"]
            jobs[refreshed] = [*words, *shlex.split(args.refresh_flags)]
            gvm = refreshed
            before = policy
            policy = f"policy_{how.slug()}_{number}"
            words = ["dvpo.py", "--gvm", f"{{home}}/{gvm}/model", "--model", f"{{home}}/{before}/model"]
            words += ["--ref-model", sft, *stage_seed, *policy_flags, "--save-rollouts"]
            jobs[policy] = [*words, "--steps", str(steps)]
            method.refreshes.append(refreshed)
            method.policies.append(policy)
        methods[label] = method
    methods["PPO"] = Method([], [], ["ppo"])
    methods["PPO, critic started from the GVM"] = Method(["gvm"], [], ["ppo_gvm"])
    return jobs, methods


# --- what the runs hold -------------------------------------------------------------------------------------


def lines_in(file: Path) -> int:
    """The number of lines of a file."""
    return file.read_bytes().count(b"\n")


def reward_name(reward: str) -> str:
    """What a reward is called in metrics.jsonl, as common/rewards.py names it."""
    if ":" in reward and not Path(reward).exists():
        return reward.split(":")[1]
    return "reward_model"


def joined_curve(home: Path, policies: list[str], every: int) -> list[dict]:
    """The evaluations of a method's policies one after the other, counted in steps from the first: {step, and
    what was measured, without its eval/}. Those between the multiples of `every` are left out: a stage may end
    anywhere."""
    curve = []
    done = 0
    for policy in policies:
        rows = rows_of(home / policy)
        for row in rows:
            step = done + row["step"]
            is_evaluation = any(key.startswith("eval/") for key in row)
            measured_before = bool(curve) and step <= curve[-1]["step"]  # by the end of the stage before
            if is_evaluation and not measured_before:
                values = {key.removeprefix("eval/"): row[key] for key in row if key.startswith("eval/")}
                curve.append({"step": step, **values})
        done += max(row["step"] for row in rows)
    last = curve[-1]["step"]
    return [row for row in curve if row["step"] % every == 0 or row["step"] == last]


def seconds_of(home: Path, jobs: list[str]) -> dict[str, float]:
    """Seconds of jobs: in their training steps, and of the whole commands, with start-up, scoring and
    evaluations."""
    steps = 0.0
    whole = 0.0
    for job in jobs:
        steps += sum(row.get("time/step_s", 0.0) for row in rows_of(home / job))
        whole += json.loads((home / job / "job.json").read_text())["seconds"]
    return {"steps": round(steps, 1), "commands": round(whole, 1)}


def scored_answers(home: Path, method: Method, how: Refreshing | None) -> dict[str, int]:
    """How many answers --reward has scored for a method: offline, and of its own policies."""
    offline = 0
    if method.gvm:
        offline = lines_in(home / "gvm/scored.jsonl")
    own = 0
    if how is not None and how.old_share < 1:
        for policy in method.policies[:-1]:
            written = lines_in(home / policy / "rollouts.jsonl")
            own += min(written, how.answers or written)
    if how is None and method.policies[0].startswith("ppo"):
        args = json.loads((home / method.policies[0] / "args.json").read_text())
        own = args["steps"] * args["batch_size"]
    return {"offline": offline, "own": own}


def collect(args: argparse.Namespace, methods: dict[str, Method]) -> dict:
    """The numbers of each seed and method that the report is made of."""
    how = refreshings(args)
    runs = {}
    for seed in args.seeds:
        home = args.out / f"seed{seed}"
        of_seed = {}
        for label, method in methods.items():
            of_seed[label] = {
                "curve": joined_curve(home, method.policies, args.eval_every),
                "scored answers": scored_answers(home, method, how.get(label)),
                "seconds": {
                    "first GVM": seconds_of(home, method.gvm),
                    "refreshes": seconds_of(home, method.refreshes),
                    "policy": seconds_of(home, method.policies),
                },
            }
        runs[str(seed)] = of_seed
    return runs


def add_to_file(file: Path, settings: dict, runs: dict) -> dict:
    """Puts the runs into a file of an earlier call, seed by seed and method by method, and returns all that it
    holds then. Ends with one line where that was made with other settings."""
    found = {"settings": settings, "runs": {}}
    if file.exists():
        found = json.loads(file.read_text())
        if found["settings"] != settings:
            sys.exit(f"error: {file} was made with other settings; give another --data or move it away")
    for seed, of_seed in runs.items():
        found["runs"].setdefault(seed, {}).update(of_seed)
    lines = []  # a run a line: compact, and a diff shows which runs are new
    for seed in sorted(found["runs"], key=int):
        of_seed = []
        for label, run in found["runs"][seed].items():
            of_seed.append(f"{json.dumps(label)}: {json.dumps(rounded(run))}")
        lines.append(f"{json.dumps(seed)}: {{\n" + ",\n".join(of_seed) + "}")
    text = f'{{"settings": {json.dumps(found["settings"])},\n"runs": {{\n' + ",\n".join(lines) + "}}\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return json.loads(text)


# --- the report ---------------------------------------------------------------------------------------------


def at_the_end(run: dict, key: str) -> float:
    """The mean of the last three evaluations."""
    return statistics.fmean(row[key] for row in run["curve"][-3:])


def interval(differences: list[float]) -> str:
    """Mean difference ± half of its 95 % t interval over seeds."""
    n = len(differences)
    mean = statistics.fmean(differences)
    if n == 1:
        return f"{mean:+.2f} (1 seed)"
    return f"{mean:+.2f} ± {half_interval(differences):.2f}"


def of_all_seeds(found: dict) -> dict[str, dict[str, dict]]:
    """The runs by method, then by seed; methods in the order in which the file has them first."""
    methods = {}
    for seed, of_seed in found["runs"].items():
        for label, run in of_seed.items():
            methods.setdefault(label, {})[seed] = run
    return methods


def report(found: dict) -> str:
    """The table of methods, the paired differences, the seconds."""
    reward = found["settings"]["reward"]
    measures = found["settings"]["measures"]
    methods = of_all_seeds(found)
    head = ["", "seeds", f"{reward} at the end", "its best evaluation", *measures, "KL (nats)", "length"]
    head += ["scored answers: offline", "of its own policies"]
    rows = []
    seconds = []
    for label, runs in methods.items():
        runs = list(runs.values())
        best = [max(row[reward] for row in run["curve"]) for run in runs]
        row = [label, len(runs), spread([at_the_end(run, reward) for run in runs]), spread(best)]
        row += [spread([at_the_end(run, key) for run in runs]) for key in [*measures, "kl", "length"]]
        row += [
            round(statistics.fmean(run["scored answers"][key] for run in runs)) for key in ("offline", "own")
        ]
        rows.append(row)
        cells = [label]
        for stage in ("first GVM", "refreshes", "policy"):
            for part in ("steps", "commands"):
                cells.append(f"{statistics.fmean(run['seconds'][stage][part] for run in runs):.0f}")
        seconds.append(cells)
    parts = [markdown(head, rows)]

    differences = []
    for label, against in pairs_to_compare(list(methods)):
        seeds = [seed for seed in methods[label] if seed in methods[against]]
        if not seeds:
            continue
        cells = [label, against, len(seeds)]
        for key in (reward, "kl"):
            ours = [at_the_end(methods[label][seed], key) for seed in seeds]
            theirs = [at_the_end(methods[against][seed], key) for seed in seeds]
            cells.append(interval(minus(ours, theirs)))
        differences.append(cells)
    parts.append(
        "Differences, seed by seed, with 95 % t intervals over seeds:\n\n"
        + markdown(["", "against", "seeds", reward, "KL (nats)"], differences)
    )
    stages = ("first GVM", "refreshes", "policy")
    head = [""]
    for stage in stages:
        head += [f"{stage}: steps", "commands"]
    parts.append(
        "Seconds: in training steps, and of the whole commands (start-up, scoring, evaluations):\n\n"
        + markdown(head, seconds)
    )
    return "\n\n".join(parts) + "\n"


def pairs_to_compare(labels: list[str]) -> list[tuple[str, str]]:
    """Which methods are compared: (this, against that)."""
    pairs = [("semi-online", "frozen GVM"), ("semi-online", "PPO"), ("frozen GVM", "PPO")]
    pairs.append(("PPO, critic started from the GVM", "PPO"))
    for label in labels:
        if label.startswith("semi-online, "):
            pairs.append((label, "semi-online"))
    return [(label, against) for label, against in pairs if label in labels and against in labels]


def draw(found: dict, file: Path) -> None:
    """Reward and KL over steps: the mean over seeds, and a band from the lowest to the highest."""
    reward = found["settings"]["reward"]
    colours = {
        "frozen GVM": "#c63",
        "semi-online": "#2a7",
        "PPO": "#444",
        "PPO, critic started from the GVM": "#27a",
    }
    figure, axes = axes_of(2, 4)
    methods = of_all_seeds(found)
    for label, colour in colours.items():
        runs = list(methods.get(label, {}).values())
        if not runs:
            continue
        steps = [row["step"] for row in runs[0]["curve"]]
        for axis, key in zip(axes, (reward, "kl"), strict=True):
            by_step = list(zip(*[[row[key] for row in run["curve"]] for run in runs], strict=True))
            lowest = [min(values) for values in by_step]
            highest = [max(values) for values in by_step]
            mean = [statistics.fmean(values) for values in by_step]
            axis.fill_between(steps, lowest, highest, color=colour, alpha=0.15, lw=0)
            axis.plot(steps, mean, color=colour, label=label, lw=1.8)
    every = found["settings"]["refresh every"]
    for axis, title in zip(axes, (f"{reward}, held-out prompts", "KL (nats a response)"), strict=True):
        for step in range(every, found["settings"]["steps"], every):
            axis.axvline(step, color="#ddd", lw=0.8, zorder=0)
        axis.set(xlabel="step (lines: refreshes)", title=title)
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=110)


def settings_of(args: argparse.Namespace) -> dict:
    """What the runs of a file have in common."""
    return {
        "reward": reward_name(args.reward),
        "measures": [reward_name(measure) for measure in args.measure],
        "model": args.model,
        "offline": args.offline,
        "prompts": args.prompts,
        "steps": args.steps,
        "refresh every": args.refresh_every,
        "refreshes": args.refreshes,
        "old share": args.old_share,
        "answers": args.answers,
        "flags": [args.flags, args.gvm_flags, args.refresh_flags, args.rl_flags],
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="reviews", help="SFT policy: a folder or hub id; reviews: makes one"
    )
    parser.add_argument("--offline", default="reviews", help="answers for the first GVM: hub id or file")
    parser.add_argument("--prompts", default="reviews", help="prompts of dvpo.py and ppo.py: hub id or file")
    parser.add_argument(
        "--reward", default="assets.reviews:reward", help="reward model or module:function that scores all"
    )
    parser.add_argument("--measure", nargs="*", help="more reward models or functions, reported alone")
    parser.add_argument("--steps", type=int, default=60, help="policy steps of each method")
    parser.add_argument("--refresh-every", type=int, default=15, help="policy steps between refreshes")
    parser.add_argument("--refreshes", type=int, default=1000, help="at most; by default as many as fit in")
    parser.add_argument("--old-share", type=float, default=0.5, help="share of offline answers in a refresh")
    parser.add_argument("--answers", type=int, default=0, help="newest answers scored at a refresh; 0: all")
    parser.add_argument("--also-every", type=int, nargs="*", default=[], help="and with these")
    parser.add_argument("--also-refreshes", type=int, nargs="*", default=[], help="and with these")
    parser.add_argument(
        "--also-old-share", type=float, nargs="*", default=[], help="and these; 1: no new answer"
    )
    parser.add_argument("--also-answers", type=int, nargs="*", default=[], help="and with these")
    parser.add_argument("--eval-every", type=int, default=5, help="policy steps between evaluations")
    parser.add_argument("--flags", default="", help="options that every script gets")
    parser.add_argument("--gvm-flags", default="", help="options of gvm_td.py")
    parser.add_argument("--refresh-flags", help="options of gvm_td.py at a refresh, on top of those")
    parser.add_argument("--rl-flags", default="", help="options of dvpo.py and ppo.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="everything is done for each")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/semi_online"), help="all runs lie in it")
    parser.add_argument("--data", type=Path, help="the numbers; by default OUT/semi_online.json")
    parser.add_argument("--docs", type=Path, help="also writes page and picture into this folder")
    parser.add_argument("--report-only", action="store_true", help="runs nothing: the report from --data")
    args = parser.parse_args(argv)
    embedded = args.prompts == "reviews"
    if args.measure is None:
        args.measure = ["assets.reviews:grammatical"] if embedded else []
    if args.refresh_flags is None:
        args.refresh_flags = EMBEDDED_REFRESH if embedded else ""
    args.data = args.data or args.out / "semi_online.json"
    return args


def main() -> None:
    args = parse()
    os.environ |= {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    # a --reward of yours (module:function) is found where you are
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), str(ROOT)])
    if args.report_only:
        found = json.loads(args.data.read_text())
    else:
        jobs, methods = commands(args)
        wanted = []
        for seed in args.seeds:
            for method in methods.values():
                wanted.append((seed, method.policies[-1]))
        Jobs(args.out, jobs, wanted, shared=set()).run(args.workers)
        found = add_to_file(args.data, settings_of(args), collect(args, methods))
    text = report(found)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "semi_online.md").write_text(text, encoding="utf-8")
    draw(found, args.out / "semi_online.png")
    if args.docs:
        put_between_marks([args.docs / "semi_online.md"], "semi_online", text)
        draw(found, args.docs / "semi_online.png")
    print(text)


if __name__ == "__main__":
    main()
