"""Tables and pictures from the runs of paper/tables.py. Each function takes the folder of all runs and the seeds, and returns
markdown; `TABLES` says which jobs it reads. A claim holds where its difference has the claimed sign in every seed."""

import json
import statistics
from pathlib import Path


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path, key: str = "eval/reward") -> list[dict]:
    """The evaluations of a run."""
    return [row for row in rows_of(folder) if key in row]


def spread(values, digits: int = 2) -> str:
    """Mean ± standard deviation over seeds."""
    values = list(values)
    return f"{statistics.fmean(values):.{digits}f}" + (
        f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    )


def verdict(differences) -> str:
    """Whether a claimed positive difference is there: by its sign in every seed, with the mean."""
    signs, seeds = [d > 0 for d in differences], f"{len(differences)} seed" + "s" * (len(differences) > 1)
    mean = f"{statistics.fmean(differences):+.3g}, {seeds}"
    if all(signs) or not any(signs):
        return f"**{'holds' if all(signs) else 'does not hold'}** ({mean})"
    return f"not separated: {sum(signs)} of {len(signs)} seeds ({mean})"


def markdown(head: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def claims(rows: list[tuple[str, str, str]]) -> str:
    return markdown(["claim", "the paper's figures, on its models", "here"], [list(row) for row in rows])


def home(out: Path, seed: int, job: str) -> Path:
    return out / f"seed{seed}" / job


def answers(out: Path, seed: int, job: str, name: str) -> tuple[list[dict], dict]:
    """The responses of one model in a run of `evaluate.py responses`, and its line of the summary."""
    folder = home(out, seed, job)
    rows = [
        json.loads(line)
        for line in (folder / name / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return rows, json.loads((folder / "responses.json").read_text())["models"][name]


def wins(out: Path, seed: int, job: str, name: str, against: str) -> float:
    """Share of prompts on which the true reward is higher than the other model's; a tie is half."""
    from assets.reviews import reward

    ours, theirs = (
        reward([row["prompt"] for row in rows], [row["response"] for row in rows])
        for rows in (answers(out, seed, job, x)[0] for x in (name, against))
    )
    return statistics.fmean((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True))


def measured(
    out: Path, seeds, job: str, names: dict[str, str], against: str, extra=lambda name: []
) -> list[list]:
    rows = []
    for name, label in names.items():
        found = [answers(out, seed, job, name)[1] for seed in seeds]
        cells = [
            label,
            spread(f["reward"]["mean"] for f in found),
            spread((100 * f["grammatical"]["mean"] for f in found), 0),
        ]
        won = (
            "-"
            if name == against
            else spread((100 * wins(out, seed, job, name, against) for seed in seeds), 0)
        )
        cells += [
            won,
            spread((f["distinct_2"]["mean"] for f in found), 3),
            spread((f["length"]["mean"] for f in found), 1),
        ]
        rows.append(cells + extra(name))
    return rows


def final(out: Path, seed: int, job: str, key: str) -> float:
    return curve(home(out, seed, job), key)[-1][key]


MEASURED = ["true reward", "grammatical, %", "wins against SFT, %", "distinct-2", "length"]
POLICIES = {"before": "SFT", "dpo": "DPO", "remax": "ReMax", "grpo": "GRPO", "ppo": "PPO"}
POLICIES |= {"dvpo": "DVPO, GVM from the reward model's scores", "dvpo_pairs": "DVPO, GVM from preferences"}
PAPER_ALPACA = dict(before=17.11, dpo=26.80, remax=20.55, grpo=27.19, ppo=19.62, dvpo=27.43)


def policies(out: Path, seeds: list[int]) -> str:
    kl = lambda name: "-" if name == "before" else spread(final(out, seed, name, "eval/kl") for seed in seeds)
    table = markdown(
        ["", *MEASURED, "KL (nats)", "AlpacaEval 2 in the paper (Mistral-7B)"],
        measured(
            out, seeds, "measured", POLICIES, "before", lambda name: [kl(name), PAPER_ALPACA.get(name, "-")]
        ),
    )
    at = {
        name: [answers(out, seed, "measured", name)[1]["reward"]["mean"] for seed in seeds]
        for name in POLICIES
    }
    lines = []
    for name in ("before", "dpo", "remax", "grpo", "ppo"):
        paper = f"27.43 beside {PAPER_ALPACA[name]}" + (
            " (Llama-3-8B base: 11.33 beside 11.14)" if name == "ppo" else ""
        )
        ours = [
            verdict([a - b for a, b in zip(at[x], at[name], strict=True)]) for x in ("dvpo", "dvpo_pairs")
        ]
        lines.append(
            (
                f"DVPO beats {POLICIES[name]}",
                paper,
                f"GVM from scores: {ours[0]}; from preferences: {ours[1]}",
            )
        )
    best = [max(at, key=lambda name: at[name][i]) for i in range(len(seeds))]
    return f"{table}\n\n{claims(lines)}\n\nBest in each seed: {', '.join(POLICIES[b].split(',')[0] for b in best)}."


COLUMNS = ("mean", "p1", "p5", "p10", "p90", "p95", "p99", "last", "backup", "score")


def accuracy(out: Path, seed: int, job: str) -> dict[str, dict]:
    """Tables of a run of `evaluate.py values` by the job that trained the model, or the baseline's name."""
    found = json.loads((home(out, seed, job) / "values.json").read_text())["accuracy"]
    return {"/".join(Path(name).parts[-2:]) if "/" in name else name: table for name, table in found.items()}


def values(out: Path, seeds: list[int]) -> str:
    found = [accuracy(out, seed, "judged") for seed in seeds]
    names = {
        "gvm_pairs/model": "GVM from preferences",
        "gvm_true/model": "GVM from the data's scores",
        "gvm_scores/model": "GVM from the reward model's scores",
        "reward/model": "scalar reward model",
        "ppo/critic": "PPO's critic",
        "baseline: the longer one": "the longer one wins",
        "baseline: the better policy": "the better author wins",
    }
    table = [
        [
            label,
            *(
                spread((f[name]["all"][key] for f in found), 3) if key in found[0][name]["all"] else ""
                for key in COLUMNS
            ),
        ]
        for name, label in names.items()
    ]
    get = lambda name, key: [f[f"{name}"]["all"][key] for f in found]
    minus = lambda a, b: verdict([x - y for x, y in zip(a, b, strict=True)])
    of_gvm = {key: statistics.fmean(get("gvm_pairs/model", key)) for key in COLUMNS[:-2]}
    best = max(of_gvm, key=of_gvm.get)
    mean, score = get("gvm_pairs/model", "mean"), get("reward/model", "score")
    lines = [
        (
            "the mean is the best statistic",
            "8B: mean 68.05, P1 57.15, P99 66.30; at 13B P99 is (74.65)",
            f"best here: {best}; mean "
            f"over P1: {minus(mean, get('gvm_pairs/model', 'p1'))}; over P99: {minus(mean, get('gvm_pairs/model', 'p99'))}; "
            f"over the last token: {minus(mean, get('gvm_pairs/model', 'last'))}",
        ),
        (
            "a GVM judges answers as well as a scalar reward model",
            "comparable averages; RewardBench Chat-Hard 67.5 beside 58.5",
            f"GVM's mean over the reward model: {minus(mean, score)}",
        ),
        (
            "preferences make a better GVM than scores",
            "mean 67.85 beside 64.51",
            minus(mean, get("gvm_true/model", "mean")),
        ),
        ("a GVM judges better than PPO's critic", "68.1 beside 60.6", minus(mean, get("ppo/critic", "mean"))),
    ]
    return markdown(["share of held-out pairs", *COLUMNS], table) + "\n\n" + claims(lines)


def authors(out: Path, seeds: list[int]) -> str:
    names = {
        "gvm_known/model": ("GVM from preferences", "mean"),
        "reward_known/model": ("scalar reward model", "score"),
        "ppo_known/critic": ("PPO's critic", "mean"),
        "baseline: the longer one": ("the longer one wins", "score"),
    }
    found = {job: [accuracy(out, seed, job) for seed in seeds] for job in ("judged_in", "judged_out")}
    get = lambda job, name, subset="all": [f[name][subset][names[name][1]] for f in found[job]]
    table = [
        [label, *(spread(get(job, name, subset), 3) for job in found for subset in ("all", "clear", "close"))]
        for name, (label, _) in names.items()
    ]
    minus = lambda a, b: verdict([x - y for x, y in zip(a, b, strict=True)])
    gvm, critic, scalar = "gvm_known/model", "ppo_known/critic", "reward_known/model"
    lines = [
        (
            "GVM over PPO's critic, in distribution",
            "68.1 beside 60.6 (8B, UltraFeedback)",
            minus(get("judged_in", gvm), get("judged_in", critic)),
        ),
        (
            "GVM over PPO's critic, out of distribution",
            "63.3 beside 57.5 (8B, HH-RLHF)",
            minus(get("judged_out", gvm), get("judged_out", critic)),
        ),
        (
            "GVM over the reward model where the answers are close",
            "67.5 beside 58.5 (8B, RewardBench Chat-Hard)",
            minus(get("judged_in", gvm, "close"), get("judged_in", scalar, "close"))
            + "; other authors: "
            + minus(get("judged_out", gvm, "close"), get("judged_out", scalar, "close")),
        ),
    ]
    head = ["", "authors it was trained on", "clear", "close", "other authors", "clear", "close"]
    return markdown(head, table) + "\n\n" + claims(lines)


def sizes(out: Path, seeds: list[int]) -> str:
    from safetensors import safe_open

    def parameters(folder):
        with safe_open(folder / "model/model.safetensors", "pt") as file:
            return sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118 (it is no dict)

    jobs = {"gvm_16": 16, "gvm_32": 32, "gvm_pairs": 64, "gvm_128": 128, "gvm_192": 192}
    found = {
        job: [json.loads((home(out, seed, job) / "accuracy.json").read_text()) for seed in seeds]
        for job in jobs
    }
    table = [
        [
            f"{parameters(home(out, seeds[0], job)) / 1e6:.2f} M",
            *(spread((f[key] for f in found[job]), 3) for key in COLUMNS[:-2]),
        ]
        for job in jobs
    ]
    means = {job: [f["mean"] for f in found[job]] for job in jobs}
    minus = lambda a, b: verdict([x - y for x, y in zip(means[a], means[b], strict=True)])
    names = list(jobs)
    here = "; ".join(
        f"{jobs[b]} over {jobs[a]}: {minus(b, a)}" for a, b in zip(names, names[1:], strict=False)
    )
    paper = "mean 63.61 (3B), 64.51 (7B), 68.05 (8B), 70.55 (13B)"
    return (
        markdown(["parameters", *COLUMNS[:-2]], table)
        + "\n\n"
        + claims([("accuracy rises with size", paper, f"hidden {here}")])
    )


def beta(out: Path, seeds: list[int]) -> str:
    keys = {"eval/reward": (1, 2), "eval/grammatical": (100, 0), "eval/kl": (1, 2), "eval/length": (1, 1)}
    table = [
        [
            label,
            *(
                spread((scale * final(out, seed, job, key) for seed in seeds), digits)
                for key, (scale, digits) in keys.items()
            ),
        ]
        for label, job in (("0.1", "dvpo"), ("0.05", "dvpo_beta_005"), ("0.01", "dvpo_beta_001"))
    ]
    return markdown(["KL coefficient of DVPO", "true reward", "grammatical, %", "KL (nats)", "length"], table)


def axes_of(count: int, height: float = 3.6):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(4.4 * count, height + 0.6), layout="constrained")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw(axis, folders: list[Path], key: str, label: str, colour: str, stretch: float = 1.0) -> None:
    """Mean over seeds, and a band from the lowest to the highest."""
    runs = [curve(folder, key) for folder in folders]
    steps = [stretch * row["step"] for row in runs[0]]
    series = list(zip(*[[row[key] for row in run] for run in runs], strict=True))
    axis.fill_between(
        steps, [min(v) for v in series], [max(v) for v in series], color=colour, alpha=0.15, lw=0
    )
    axis.plot(steps, [statistics.fmean(v) for v in series], color=colour, label=label, lw=1.8)


ONLINE = {
    "ppo": ("PPO", "#444"),
    "dvpo": ("DVPO, GVM from scores", "#2a7"),
    "dvpo_pairs": ("DVPO, GVM from preferences", "#7b3"),
    "grpo": ("GRPO", "#27a"),
    "remax": ("ReMax", "#c63"),
}


def curves(out: Path, seeds: list[int]) -> str:
    """Reward, grammar and KL of the online methods over training."""
    figure, axes = axes_of(3)
    titles = {
        "eval/reward": "true reward",
        "eval/grammatical": "share grammatical",
        "eval/kl": "KL to the SFT policy (nats)",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for job, (label, colour) in ONLINE.items():
            draw(axis, [home(out, seed, job) for seed in seeds], key, label, colour)
        axis.set(xlabel="step (256 responses)", title=title)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    figure.savefig(out / "online.png", dpi=120)
    return "![reward, grammar and KL of the online methods over training](online.png)\n\n(Band: lowest to highest seed.)"


def cost(out: Path, seeds: list[int]) -> str:
    """Median step of short runs made in turn, beside PPO's of the same round; memory of the state."""
    rounds = sorted(
        {
            folder.name.rpartition("_")[2]
            for folder in home(out, seeds[0], "").glob("timed_ppo_*")
            if folder.is_dir()
        }
    )
    table, ratios = [], {}
    for job, label in (("ppo", "PPO"), ("dvpo", "DVPO"), ("grpo", "GRPO"), ("remax", "ReMax")):
        steps = [
            [r for r in rows_of(home(out, seeds[0], f"timed_{job}_{n}")) if "time/step_s" in r][1:]
            for n in rounds
        ]
        seconds = [statistics.median(r["time/step_s"] for r in rows) for rows in steps]
        state = steps[0][-1]["memory/state_gb"]
        ratios[job] = (seconds, state)
        time = spread(a / b for a, b in zip(seconds, ratios["ppo"][0], strict=True))
        table.append([label, time, f"{state / ratios['ppo'][1]:.2f}"])
    ratio = [a / b for a, b in zip(*(ratios[job][0] for job in ("dvpo", "ppo")), strict=True)]
    memory = ratios["dvpo"][1] / ratios["ppo"][1]
    lines = [
        (
            "a step of DVPO takes 0.57 to 0.69 of PPO's",
            "3B: 13 s of 23 s; 8B: 48 s of 70 s",
            f"{spread(ratio)}",
        ),
        (
            "its memory is 0.66 to 0.77 of PPO's",
            "3B: 27.50 of 41.43 GB; 8B: 60.49 of 78.96 GB (whole GPU)",
            f"{memory:.2f} of weights, gradients, optimizer state and frozen models; a whole GPU's memory cannot be tested here",
        ),
    ]
    return markdown(["", "time a step / PPO's", "state / PPO's"], table) + "\n\n" + claims(lines)


OFFLINE = {"offline_sft": "SFT", "kto": "KTO", "dro": "DRO-V", "rpo": "RPO", "dpo": "DPO"}
COLUMNS = {
    "eval/reward": (1, 2),
    "eval/grammatical": (100, 0),
    "eval/kl": (1, 2),
    "eval/distinct_2": (1, 3),
    "eval/pair_accuracy": (1, 3),
}
HEAD = ["true reward", "grammatical, %", "KL (nats)", "distinct-2", "pair accuracy"]


def offline_row(out: Path, seeds: list[int], job: str, label: str) -> list[str]:
    job = "offline_sft_measured" if job == "offline_sft" else job
    cells = [
        spread((s * final(out, seed, job, key) for seed in seeds), digits)
        for key, (s, digits) in COLUMNS.items()
    ]
    return [label, *cells]


def compare(out: Path, seeds: list[int], a: str, b: str, key: str = "eval/reward", sign: float = 1) -> str:
    """Verdict on `key` of job a over job b. Rubble has a true reward of 0, above that of a sad review: it is no success."""
    a, b = ("offline_sft_measured" if x == "offline_sft" else x for x in (a, b))
    grammatical = statistics.fmean(final(out, seed, a, "eval/grammatical") for seed in seeds)
    if key == "eval/reward" and grammatical < 0.5:
        return f"**does not hold**: {100 * grammatical:.0f} % of its answers are grammatical"
    return verdict([sign * (final(out, seed, a, key) - final(out, seed, b, key)) for seed in seeds])


def offline(out: Path, seeds: list[int]) -> str:
    tables = [
        markdown(
            ["summed log-probabilities", *HEAD],
            [offline_row(out, seeds, job, label) for job, label in OFFLINE.items()],
        )
    ]
    rows = [
        offline_row(out, seeds, f"{job}_normalised", label)
        for job, label in OFFLINE.items()
        if job != "offline_sft"
    ]
    tables.append(markdown(["length-normalised", *HEAD], rows))
    lines = []
    for a, b in (("rpo", "offline_sft"), ("rpo", "kto"), ("rpo", "dro"), ("kto", "offline_sft")):
        forms = [compare(out, seeds, a, b)]
        forms.append(compare(out, seeds, f"{a}_normalised", b if b == "offline_sft" else f"{b}_normalised"))
        pairs = compare(out, seeds, a, b, "eval/pair_accuracy")
        here = f"reward: {forms[0]}; length-normalised {forms[1]}; pair accuracy: {pairs}"
        lines.append((f"{OFFLINE[a]} beats {OFFLINE[b]}", "claimed; figures not known to us", here))
    forms = [
        verdict(
            [
                min(final(out, s, f"{job}{x}", "eval/kl") for job in ("kto", "dro"))
                - final(out, s, f"rpo{x}", "eval/kl")
                for s in seeds
            ]
        )
        for x in ("", "_normalised")
    ]
    lines.append(
        ("RPO's KL is the smallest", "claimed", f"summed: {forms[0]}; length-normalised: {forms[1]}")
    )
    return "\n\n".join([*tables, claims(lines)])


def unseen(out: Path, seeds: list[int]) -> str:
    names = {"before": "before", "sft": "SFT", "kto": "KTO", "dro": "DRO-V", "rpo": "RPO", "dpo": "DPO"}
    head, parts = ["", *MEASURED], []
    for job, title in (
        ("measured_seen", "in domain: prompts about dishes of the training rows"),
        ("measured_unseen", "out of domain: at least one dish of the prompt in no training row"),
    ):
        prompts = answers(out, seeds[0], job, "sft")[1]["reward"]["n"]
        parts.append(
            f"**{title}** ({prompts} prompts)\n\n" + markdown(head, measured(out, seeds, job, names, "sft"))
        )
    at = {x: [answers(out, seed, "measured_unseen", x)[1]["reward"]["mean"] for seed in seeds] for x in names}
    lines = [
        (
            f"RPO beats {names[x]} out of domain",
            "win rates, opponent not named: AlpacaEval 79.5, IFEval 81.2, MT-Bench 77.1",
            verdict([a - b for a, b in zip(at["rpo"], at[x], strict=True)]),
        )
        for x in ("sft", "kto", "dro")
    ]
    return "\n\n".join([*parts, claims(lines)])


ABLATIONS = {
    "rpo": "tau 0.3, all responses",
    "rpo_tau_01": "tau 0.1",
    "rpo_tau_1": "tau 1",
    "rpo_no_partition": "no partition value",
    "rpo_no_partition_normalised": "no partition value, length-normalised",
    "rpo_keep_75": "75 % of the responses",
    "rpo_keep_50": "50 %",
    "rpo_keep_25": "25 %",
    "rpo_noise_01": "noise 0.1",
    "rpo_noise_05": "noise 0.5",
    "rpo_noise_10": "noise 1.0",
}


def ablations(out: Path, seeds: list[int]) -> str:
    table = markdown(
        ["RPO", *HEAD], [offline_row(out, seeds, job, label) for job, label in ABLATIONS.items()]
    )
    drop = lambda a, b: compare(out, seeds, a, b)
    lines = [
        (
            "without the partition value it drops",
            "claimed",
            f"{drop('rpo', 'rpo_no_partition')}; length-normalised {drop('rpo_normalised', 'rpo_no_partition_normalised')}",
        ),
        (
            "a mild drop with fewer responses",
            "claimed",
            "; ".join(f"{n} %: {drop('rpo', f'rpo_keep_{n}')}" for n in (75, 50, 25)),
        ),
        (
            "a mild drop with noise",
            "claimed",
            "; ".join(
                f"{n}: {drop('rpo', f'rpo_noise_{j}')}"
                for n, j in (("0.1", "01"), ("0.5", "05"), ("1.0", "10"))
            ),
        ),
        (
            "trouble at tau 0.1: less grammatical than at 0.3",
            "claimed",
            compare(out, seeds, "rpo", "rpo_tau_01", "eval/grammatical"),
        ),
    ]
    return table + "\n\n" + claims(lines)


def kl(out: Path, seeds: list[int]) -> str:
    figure, axes = axes_of(4)
    for axis, (key, extra, title) in zip(
        axes,
        (
            ("eval/reward", "", "true reward"),
            ("eval/kl", "", "KL to the reference (nats)"),
            ("eval/reward", "_normalised", "true reward, length-normalised"),
            ("eval/kl", "_normalised", "KL, length-normalised"),
        ),
        strict=True,
    ):
        for job, label, colour in (
            ("kto", "KTO", "#27a"),
            ("dro", "DRO-V", "#c63"),
            ("rpo", "RPO", "#2a7"),
            ("dpo", "DPO", "#92c"),
        ):
            draw(axis, [home(out, seed, job + extra) for seed in seeds], key, label, colour)
        axis.set(xlabel="step", title=title)
        if key == "eval/kl":
            axis.set_yscale("symlog", linthresh=1)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(out / "offline.png", dpi=120)
    return (
        "![true reward and KL of the offline methods over training, summed and length-normalised](offline.png)\n\n"
        "(Band: lowest to highest seed. The KL axes are linear up to 1.)"
    )


TABLES = {  # name: (function, the jobs it reads)
    "policies": (policies, ["measured", *[name for name in POLICIES if name != "before"]]),
    "values": (values, ["judged"]),
    "authors": (authors, ["judged_in", "judged_out"]),
    "sizes": (sizes, ["gvm_16", "gvm_32", "gvm_pairs", "gvm_128", "gvm_192"]),
    "beta": (beta, ["dvpo", "dvpo_beta_005", "dvpo_beta_001"]),
    "curves": (curves, list(ONLINE)),
    "cost": (cost, []),  # timed apart, one at a time
    "offline": (
        offline,
        [
            "offline_sft_measured",
            *[f"{x}{y}" for x in ("kto", "dro", "rpo", "dpo") for y in ("", "_normalised")],
        ],
    ),
    "unseen": (unseen, ["measured_seen", "measured_unseen"]),
    "ablations": (ablations, [*ABLATIONS, "rpo_normalised"]),
    "kl": (kl, [f"{x}{y}" for x in ("kto", "dro", "rpo", "dpo") for y in ("", "_normalised")]),
}


def write(out: Path, seeds: list[int], names: list[str], docs: Path | None) -> None:
    """Each table to out/table-NAME.md; with `docs` also between its marks in docs/results.md, and the pictures there."""
    page = docs and docs / "results.md"
    text = page.read_text(encoding="utf-8") if page else ""
    for name in names:
        found = TABLES[name][0](out, seeds)
        files = [home(out, seed, job) / "job.json" for seed in seeds for job in TABLES[name][1]]
        records = [json.loads(file.read_text()) for file in files or out.glob("seed*/timed*/job.json")]
        commits = sorted({record["commit"].rstrip("+") for record in records})
        dates = sorted({record["date"] for record in records})
        where = f"`python paper/tables.py --only {name}`; seeds {', '.join(map(str, seeds))}; commit {', '.join(commits)}"
        what = "rounds of seed " + str(seeds[0]) if name == "cost" else "seeds"
        found += f"\n\n({where}; {dates[-1]}. Mean ± standard deviation over {what}.)\n"
        (out / f"table-{name}.md").write_text(found, encoding="utf-8")
        print(f"\n## {name}\n\n{found}", flush=True)
        first, last = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
        if first in text:
            head, rest = text.split(first)
            text = head + first + found + last + rest.split(last, 1)[1]
    if page:
        page.write_text(text, encoding="utf-8")
        for picture in out.glob("*.png"):
            (docs / picture.name).write_bytes(picture.read_bytes())
