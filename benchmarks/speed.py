"""Our scripts beside TRL's trainers at matched work: one command, one table, everything paired in one run.

    python benchmarks/speed.py --size tiny                 # minutes on a CPU
    python benchmarks/speed.py --size 100m                 # an hour or two on one CPU thread
    python benchmarks/speed.py --size 1b                   # one GPU, bf16
    python benchmarks/speed.py --size tiny --only grpo dpo --pairs 3
    python benchmarks/speed.py --scaling --steps 2         # our own cost as the work grows; see scaling.py

GRPO, DPO, KTO, SFT and the reward model against the installed `trl`; PPO against trl 1.12.0, the last release with a PPO trainer,
in an environment that the script makes under --envs (once; with the torch and transformers of this one).

Both sides get the same random model from one folder, the same rows in the same order, the same batch, micro-batch, group, epochs,
AdamW, rate, clipping, KL coefficient and reference, float32 on a CPU and float32 weights with bf16 compute on a GPU, a line of
log a step to files, no evaluation and no checkpoint. Each run is a process of its own (speed_side.py says what is timed, and
what is not TRL's default). Runs come in pairs, first one side then the other, turned round in the next pair. A ratio is of the
medians over the steps of a pair, its first step left out; the table shows the median over pairs and the range. Peak memory is
above what the imports take, until the end of the last step; on a GPU, what torch has allocated.

A row is refused where the losses of the first step differ. The policy is not the reference, so no loss is a constant. What is
sampled differs between two libraries: for GRPO and PPO our functions compute the loss of TRL's own first rollout. The random
model ends its responses when their prompts say (see `make_models`): those of `grpo` and `ppo` all reach the limit, those of
`grpo-ragged` and `ppo-ragged` end at lengths that vary from prompt to prompt, the same on both sides to the token.
"""

import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "benchmarks")]
import scaling  # noqa: E402

import grpo  # noqa: E402
import ppo  # noqa: E402
from common.batches import batch_indices, collate  # noqa: E402
from common.cli import fail  # noqa: E402
from common.data import prompt_hash  # noqa: E402
from common.logprobs import response_logprobs  # noqa: E402
from common.value_heads import response_values, sequence_scores  # noqa: E402
from tools.jobs import commit  # noqa: E402

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
PEERS = {
    "grpo": "",
    "grpo-ragged": "",
    "dpo": "",
    "kto": "",
    "sft": "",
    "reward": "",
    "ppo": "1.12.0",
    "ppo-ragged": "1.12.0",
}
PEERS |= {"dvpo": "ppo.py", "dvpo-ragged": "ppo.py"}  # beside our own PPO
LR, BETA = 1e-6, {"grpo": 0.2, "ppo": 0.05, "dvpo": 0.05, "dpo": 0.1, "kto": 0.1}
LOGGED = {  # what is compared, in our log and in theirs
    "grpo": ("policy/loss", "loss"),
    "ppo": ("objective/kl", "objective/kl"),
    "dvpo": ("objective/kl", "loss"),
    "dpo": ("dpo/loss", "loss"),
    "kto": ("kto/loss", "loss"),
    "sft": ("sft/loss", "loss"),
    "reward": ("reward/loss", "loss"),
}
FIELDS = {
    "sft": ["response"],
    "kto": ["response"],
    "dpo": ["chosen", "rejected"],
    "reward": ["chosen", "rejected"],
}
# hidden size, layers and so on; for each kind of work tokens of the typical prompt and of the longest response (offline: of
# the typical one is a third of that), sequences (dpo, reward: pairs) a step and a forward pass
SIZES = {
    "tiny": dict(
        model=dict(
            vocab_size=1024,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
        ),
        grpo=dict(prompt=24, response=64, batch=64, group=8, micro=8),
        ppo=dict(prompt=24, response=64, batch=32, micro=8, epochs=4),
        offline=dict(prompt=24, response=128, batch=32, micro=8),
    ),
    "100m": dict(
        model=dict(
            vocab_size=32000,
            hidden_size=640,
            intermediate_size=1712,
            num_hidden_layers=12,
            num_attention_heads=10,
        ),
        grpo=dict(prompt=32, response=64, batch=16, group=4, micro=4),
        ppo=dict(prompt=32, response=64, batch=8, micro=4, epochs=4),
        offline=dict(prompt=32, response=128, batch=8, micro=2),
    ),
    "1b": dict(
        model=dict(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        grpo=dict(prompt=128, response=512, batch=64, group=8, micro=4),
        ppo=dict(prompt=128, response=256, batch=32, micro=4, epochs=4),
        offline=dict(prompt=128, response=1024, batch=32, micro=4),
    ),
    "3b": dict(
        model=dict(
            vocab_size=32000,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
        ),
        grpo=dict(prompt=128, response=512, batch=64, group=8, micro=2),
        ppo=dict(prompt=128, response=256, batch=16, micro=2, epochs=4),
        offline=dict(prompt=128, response=1024, batch=16, micro=2),
    ),
}


@dataclass
class Args:
    size: Literal["tiny", "100m", "1b", "3b"] = "tiny"
    """model and batches; 1b and 3b are for a GPU"""
    only: tuple[str, ...] = tuple(PEERS)
    """rows of the table"""
    pairs: int = 5
    """runs of each side"""
    steps: int = 4
    """timed steps of a run; one more goes before them"""
    out: str = "runs/speed"
    """models, data, logs and the table go here"""
    envs: str = "runs/envs"
    """environments that are made here and kept"""
    pip_arguments: tuple[str, ...] = ()
    """for such an environment, e.g. `--pip-arguments=--index-url=https://download.pytorch.org/whl/cpu`"""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the GPU where there is one"""
    scaling: bool = False
    """instead: our own cost as the work grows (scaling.py), a table and a picture"""


# --- the same models and data for both sides


def token_kinds(vocab: int, limit: int) -> list[int]:
    """What each token is: 0, a plain word; c >= 1, a word of a response that has c tokens left to come, its eos among them; -1,
    special. Half of the words are plain."""
    each = (vocab - len(SPECIAL)) // (2 * limit)
    plain = vocab - len(SPECIAL) - each * limit
    return [-1] * len(SPECIAL) + [0] * plain + [1 + i // each for i in range(each * limit)]


def make_models(out: Path, shape: dict, limit: int) -> dict[str, str]:
    """Folders of a policy, a reference, a reward and a value model, random Llamas with one tokenizer of made-up words.

    An untrained model never ends a response, or nobody knows when. In this one the embedding of a word carries the code of its
    kind, and the output layer prefers what may follow: a plain word after a plain one, so responses go on for ever; after a
    word of kind c one of kind c - 1, after kind 1 eos, so a prompt that ends in kind n has responses of n tokens, whatever is
    sampled. It changes numbers in the weights and nothing in the work. The noise in the policy's output layer is greater than in
    the reference's: there is a KL to measure, and KTO's estimate of it on mismatched pairs is below 0 on every
    micro-batch and thus clamped on both sides (TRL takes it of a micro-batch, we of the batch: the losses would differ).
    """
    paths = {name: str(out / name) for name in ("policy", "reference", "reward", "gvm")}
    key = json.dumps([shape, limit, 3])
    if (out / "key").exists() and (out / "key").read_text() == key:
        return paths
    vocab, width = shape["vocab_size"], shape["hidden_size"]
    words = SPECIAL + [f"w{i}" for i in range(len(SPECIAL), vocab)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{word[1:-1]}_token": word for word in SPECIAL}
    )

    torch.manual_seed(0)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlamaConfig(max_position_embeddings=8192, tie_word_embeddings=False, **special, **shape)
    model = LlamaForCausalLM(config)
    codes, kinds = F.normalize(torch.randn(limit + 2, width), dim=1), torch.tensor(token_kinds(vocab, limit))
    codes[-1] = 0
    before = torch.where((kinds < 0) | (kinds == limit), limit + 1, torch.where(kinds == 0, 0, kinds + 1))
    before[2] = 1  # eos comes after kind 1
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 10)  # words differ, or every reward would be the same
        model.model.embed_tokens.weight[2] /= 1000  # what a reward model reads at eos is what went before
        model.model.embed_tokens.weight += 20 * width**0.5 * codes[kinds]
        for name, noise in (("policy", 1.0), ("reference", 0.1)):
            model.lm_head.weight.normal_(0, noise / width**0.5)
            model.lm_head.weight += 30 / width**0.5 * codes[before]
            model.save_pretrained(paths[name])
        scorer = LlamaForSequenceClassification(LlamaConfig(**config.to_dict() | {"num_labels": 1}))
        scorer.model = model.model
        scorer.score.weight.normal_(0, 1 / width**0.5)
        scorer.save_pretrained(paths["reward"])
        valuer = LlamaForTokenClassification(
            LlamaConfig(**config.to_dict() | {"num_labels": 1, "classifier_dropout": 0.0})
        )
        valuer.model, valuer.score.weight = model.model, scorer.score.weight
        valuer.save_pretrained(paths["gvm"])
    for path in paths.values():
        tokenizer.save_pretrained(path)
    (out / "key").write_text(key)
    return paths


def make_rows(algorithm: str, size: dict, steps: int, vocab: int, limit: int) -> list[dict]:
    """Rows enough for `steps`, of lengths with a log-normal spread (sigma 0.6), as in real data."""
    generator = torch.Generator().manual_seed(1)
    kinds = token_kinds(vocab, limit)
    plain = [i for i, kind in enumerate(kinds) if kind == 0]

    def length(typical, most):
        return int(min(most, max(2, typical * math.exp(0.6 * torch.randn((), generator=generator).item()))))

    def text(n):
        return " ".join(f"w{plain[i]}" for i in torch.randint(len(plain), (n,), generator=generator).tolist())

    rows, name = [], algorithm.removesuffix("-ragged")
    for i in range(size["batch"] // size.get("group", 1) * steps):
        row = {"prompt": text(length(size["prompt"], 4 * size["prompt"]))}
        if algorithm.endswith("-ragged"):
            row["prompt"] += f" w{kinds.index(length(limit // 3, limit))}"
        for key in FIELDS.get(name, ()):
            row[key] = text(length(size["response"] // 3, size["response"] - 1))
        rows.append(row | ({"label": i % 2 == 0} if name == "kto" else {}))
    return rows


def in_drawn_order(rows: list[dict], algorithm: str, a_step: int) -> list[dict]:
    """The rows as our script draws them with seed 0: TRL is told not to shuffle."""
    if algorithm.split("-")[0] in ("grpo", "ppo", "dvpo"):  # they sort prompts by a hash, to hold some out
        rows = sorted(rows, key=lambda row: prompt_hash(row["prompt"], 1))
    return [rows[i] for step in range(len(rows) // a_step) for i in batch_indices(len(rows), a_step, step, 0)]


def our_arguments(
    algorithm: str, paths: dict, files: dict, size: dict, steps: int, run_dir: Path
) -> list[str]:
    """The command line of our script."""
    name = algorithm.split("-")[0]
    words = dict(
        dataset=files["ours"],
        run_dir=run_dir,
        steps=steps,
        batch_size=size["batch"],
        micro_batch_size=size["micro"],
    )
    words |= dict(
        lr=LR, lr_schedule="constant", warmup_steps=0, max_prompt_length=100_000, eval_every=0, save_every=0
    )
    words |= dict(
        model=paths["reward" if name == "reward" else "policy"], max_response_length=size["response"]
    )
    if name in BETA:
        words |= dict(beta=BETA[name], ref_model=paths["reference"])
    if name in ("grpo", "ppo", "dvpo"):
        words |= dict(mini_batch_size=size["batch"], epochs=size.get("epochs", 1), eval_prompts=0)
        own = {"ppo": dict(reward=paths["reward"], critic_lr=LR), "dvpo": dict(gvm=paths["gvm"])}
        words |= own.get(name) or dict(group_size=size["group"])
    else:
        words |= dict(eval_dataset=files["eval"]) | (dict(eval_prompts=0) if name != "reward" else {})
    if name == "grpo":
        words |= dict(reward="benchmarks.speed_side:reward", aggregation="grpo")
    return [part for key, value in words.items() for part in ("--" + key.replace("_", "-"), str(value))] + [
        "--overwrite"
    ]


# --- running


def python_with_trl(version: str, args: Args) -> str:
    """The interpreter that has TRL: this one, or that of an environment made here, with the same torch and transformers."""
    if not version and find_spec("trl"):
        return sys.executable
    version = version or "1.16.0"
    folder = Path(args.envs, f"trl-{version}").absolute()
    python, stamp = folder / "bin/python", folder / "installed"
    if not stamp.exists():
        print(f"making {folder}, once", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        same = [
            f"{name}=={metadata.version(name).split('+')[0]}"
            for name in ("torch", "transformers", "datasets", "numpy")
        ]
        wanted = [f"trl=={version}", "tensorboard", *same]
        done = subprocess.run([str(python), "-m", "pip", "install", "-q", *args.pip_arguments, *wanted])
        if done.returncode:
            fail(f"pip could not install {' '.join(wanted)} in {folder}; see --pip-arguments")
        stamp.touch()
    return str(python)


def run_side(python: str, spec: dict, log: Path) -> dict:
    """Runs one process; its record, or {"error": one line}."""
    file = Path(spec["out"]).with_suffix(".spec.json")
    Path(spec["out"]).unlink(missing_ok=True)
    file.write_text(json.dumps(spec))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if spec["device"] == "cpu" else {}
    with open(log, "w") as stream:
        command = [python, str(ROOT / "benchmarks/speed_side.py"), str(file)]
        code = subprocess.run(
            command, stdout=stream, stderr=stream, cwd=ROOT, env=os.environ | hidden
        ).returncode
    if code:
        lines = log.read_text().strip().splitlines() or [f"exit {code}"]
        return {"error": f"{spec['side']} failed: {lines[-1][:200]} (see {log})"}
    return json.loads(Path(spec["out"]).read_text())


def replayed_loss(name: str, record: dict, paths: dict, size: dict, device: str) -> float:
    """What our functions make of TRL's first rollout: GRPO's loss, or, of PPO, whose first policy loss is 0, the critic's."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pad, first = 0, record["first"]
    sequences = list(zip(first["prompt"], first["completion"], strict=True))
    load = lambda path, auto=AutoModelForCausalLM: auto.from_pretrained(path, dtype=dtype).to(device).eval()
    whole = collate(sequences, pad, device)["response_mask"]

    @torch.no_grad()
    def each(forward, width):
        """[N, width] of all sequences, some at a time."""
        out = torch.zeros(len(sequences), width, device=device)
        for start in range(0, len(sequences), size["micro"]):
            found = forward(collate(sequences[start : start + size["micro"]], pad, device)).float()
            out[start : start + size["micro"], : found.shape[1]] = found
        return out

    def logprobs(path):
        model = load(path)
        model.response_logprobs, model.forbidden_token = MethodType(response_logprobs, model), None
        return each(lambda mb: model.response_logprobs(**mb)[0], whole.shape[1])

    new, ref = logprobs(paths["policy"]), logprobs(paths["reference"])
    if name == "grpo":
        rewards = torch.tensor(first["rewards"], device=device)
        advantages = grpo.group_advantages(rewards, size["group"])[0][:, None]
        weights = grpo.token_weights(whole, "grpo", size["response"])
        loss, _ = grpo.surrogate_loss(new, new, advantages, weights, whole, 0.2, 0.2)
        return (loss + BETA["grpo"] * (grpo.kl_estimates(new, ref, whole)[1] * weights).sum()).item()
    critic = load(paths["reward"], AutoModelForSequenceClassification)
    score = each(lambda mb: sequence_scores(critic, **mb), 1)[:, 0]
    trunk, critic_head = critic.model, critic.score

    def values(mb):
        def forward(input_ids, use_cache):
            hidden = trunk(input_ids=input_ids, use_cache=use_cache).last_hidden_state
            return type("Output", (), {"logits": critic_head(hidden)})

        return response_values(forward, **mb)

    old = each(values, whole.shape[1] + 1)[:, :-1]
    kl, _ = ppo.kl_estimates(new, ref, whole)
    advantages = ppo.gae(ppo.token_rewards(kl, score, whole, BETA["ppo"]), old, whole, 1.0, 0.95)
    return (ppo.value_loss(old, old, advantages + old, whole, 0.2) / whole.sum()).item()


# --- the table


def summary(record: dict, spec: dict) -> dict:
    """A run in numbers: medians over its steps but the first."""
    ends = [step["at"] for step in record["steps"]]
    cpu = [step["cpu"] for step in record["steps"]]
    seconds, cpu_seconds = (
        statistics.median(b - a for a, b in zip(x, x[1:], strict=False)) for x in (ends, cpu)
    )
    out = dict(seconds=seconds, cpu_seconds=cpu_seconds, peak_mb=record["peak_mb"])
    timed = [
        r for r in record["rollouts"] if ends[0] < r["at"] <= ends[-1]
    ]  # none after the last step, nor in the first
    if timed:
        made = sum(sum(r["lengths"]) for r in timed) / (len(ends) - 1)
        spent = sum(r["seconds"] for r in timed) / (len(ends) - 1)
        mean = statistics.fmean(n for r in timed for n in r["lengths"])
        tokens = spec["epochs"] * (made + spec["prompt_tokens"])
        return out | dict(
            length=mean, rollout_tokens_s=made / spent, update_tokens_s=tokens / (seconds - spent)
        )
    return out | dict(update_tokens_s=spec["tokens"] / seconds)


def disagreement(ours: float, theirs: float, tolerance: float, what: str = "losses") -> str:
    """'' where two numbers agree, else why the row is not comparable."""
    close = (
        math.isfinite(ours)
        and math.isfinite(theirs)
        and abs(ours - theirs) <= tolerance * max(abs(ours), abs(theirs))
    )
    return "" if close else f"not comparable: {what} {ours:.5g} and {theirs:.5g}"


def compared(pairs: list[dict]) -> dict:
    """The medians of each side and the ratios of the pairs; `pairs`: [{"ours": summary, "trl": summary}]."""
    row = {}
    for key in pairs[0]["ours"]:
        for side in ("ours", "trl"):
            row[f"{side}_{key}"] = statistics.median(pair[side][key] for pair in pairs)
        ratios = [pair["ours"][key] / pair["trl"][key] for pair in pairs]
        row[f"ratio_{key}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return row


def table(rows: list[dict], cpu: bool = False) -> str:
    """Markdown. Ratios are ours over TRL's: median over pairs (smallest to greatest). On a CPU a step's own CPU time tells
    whether anything else ran beside it."""

    def ratio(values):
        return "{:.2f} ({:.2f}-{:.2f})".format(*values)

    def both(row, key, form):
        return f"{row['ours_' + key]:{form}} / {row['trl_' + key]:{form}}" if "ours_" + key in row else "-"

    head = "| | s a step, ours / TRL | ratio | rollout tokens/s | update tokens/s | peak MB | ratio | first loss |"
    lines = [head, "|" + "---|" * 8]
    for row in rows:
        if "refused" in row:
            lines.append(f"| {row['name']} | {row['refused']} |" + " |" * 6)
            continue
        cells = [
            row["name"],
            both(row, "seconds", ".3g"),
            ratio(row["ratio_seconds"]),
            both(row, "rollout_tokens_s", ",.0f"),
        ]
        cells += [
            both(row, "update_tokens_s", ",.0f"),
            both(row, "peak_mb", ",.0f"),
            ratio(row["ratio_peak_mb"]),
        ]
        lines.append("| " + " | ".join([*cells, f"{row['losses'][0]:.5g} / {row['losses'][1]:.5g}"]) + " |")
    shares = [
        row[f"{side}_cpu_seconds"] / row[f"{side}_seconds"]
        for row in rows
        for side in ("ours", "trl")
        if "losses" in row
    ]
    if cpu and shares and min(shares) < 0.9:
        lines += [
            "",
            f"The machine was busy with other work: a step had a CPU for {min(shares):.0%} of its time. Measure again.",
        ]
    return "\n".join(lines)


def measure(algorithm: str, args: Args, device: str) -> dict:
    """One row of the table."""
    name, shape = algorithm.split("-")[0], SIZES[args.size]
    size = shape[{"ppo": "ppo", "dvpo": "ppo", "grpo": "grpo"}.get(name, "offline")]
    limit = shape["ppo" if name in ("ppo", "dvpo") else "grpo"]["response"]
    out, steps = Path(args.out, args.size).absolute(), args.steps + 1
    (out / f"models-{limit}").mkdir(parents=True, exist_ok=True)
    paths = make_models(out / f"models-{limit}", shape["model"], limit)
    rows = make_rows(algorithm, size, steps, shape["model"]["vocab_size"], limit)
    a_step = size["batch"] // size.get("group", 1)
    files = {side: str(out / f"{algorithm}-{side}.jsonl") for side in ("ours", "trl", "eval")}
    for side, part in (("ours", rows), ("trl", in_drawn_order(rows, algorithm, a_step)), ("eval", rows[:2])):
        Path(files[side]).write_text("".join(json.dumps(row) + "\n" for row in part))
    words = lambda key: sum(len(row[key].split()) for row in rows if key in row) / steps
    prompts = (words("prompt") + a_step) * (2 if "chosen" in rows[0] else 1) * size.get("group", 1)  # + bos
    answers = sum(
        words(key) + a_step * (key in rows[0]) for key in ("response", "chosen", "rejected")
    )  # + eos
    work = dict(epochs=size.get("epochs", 1), prompt_tokens=prompts, tokens=prompts + answers)
    beside_ppo = PEERS[algorithm] == "ppo.py"
    python = sys.executable if beside_ppo else python_with_trl(PEERS[algorithm], args)

    pairs, records, losses = [], [], None
    for number in range(args.pairs):
        pair = {}
        for side in ("ours", "trl") if number % 2 == 0 else ("trl", "ours"):
            stem = out / f"{algorithm}-{number}-{side}"
            spec = dict(
                side=side, device=device, out=f"{stem}.json", run_dir=str(stem), size=size, steps=steps, lr=LR
            )
            spec |= dict(
                algorithm=name,
                script=name,
                beta=BETA.get(name, 0.0),
                rows=files["trl"],
                model=paths["policy"],
            )
            spec |= dict(ref_model=paths["reference"], reward_model=paths["reward"])
            spec["arguments"] = our_arguments(algorithm, paths, files, size, steps, stem)
            if side == "trl" and beside_ppo:
                spec |= dict(
                    side="ours", script="ppo", arguments=our_arguments("ppo", paths, files, size, steps, stem)
                )
            record = run_side(python if side == "trl" else sys.executable, spec, Path(f"{stem}.log"))
            shutil.rmtree(stem, ignore_errors=True)
            if "error" in record:
                return dict(name=algorithm, refused=record["error"])
            records.append(record)
            pair[side] = summary(record, work)
            pair[side + "_record"] = record
        why = ""
        if (
            pair["ours_record"]["versions"]["torch"].split("+")[0]
            != pair["trl_record"]["versions"]["torch"].split("+")[0]
        ):
            why = "not comparable: two versions of torch"
        mine = [step["metrics"][LOGGED[name][0]] for step in pair["ours_record"]["steps"]]
        if beside_ppo:  # the same samples, as they are drawn by the same numbers
            theirs = {"loss": [step["metrics"][LOGGED[name][0]] for step in pair["trl_record"]["steps"]]}
        else:
            theirs = pair["trl_record"]["logged"]
        if losses is None and name in ("grpo", "ppo"):
            # (TRL's PPO gives the score one token after eos; with a critic that starts as the reward model it is all the same)
            replayed = replayed_loss(name, pair["trl_record"], paths, size, device)
            losses = [
                replayed,
                pair["trl_record"]["first"]["value_loss"] if name == "ppo" else theirs["loss"][0],
            ]
        losses = losses or [mine[0], theirs["loss"][0]]
        why = why or disagreement(*losses, 1e-3 if device == "cpu" else 0.03)
        if name in (
            "grpo",
            "ppo",
        ):  # and what our script itself logs, of its own samples, is the same but for chance
            both = [statistics.fmean(x) for x in (mine, theirs[LOGGED[name][1]])]
            why = why or disagreement(*both, 0.25, f"mean {LOGGED[name][0]}")
        if "length" in pair["ours"]:
            why = why or disagreement(pair["ours"]["length"], pair["trl"]["length"], 0.02, "mean lengths")
        if why:
            return dict(name=algorithm, refused=why)
        pairs.append(pair)
        step, cpu, memory = (
            pair["ours"][key] / pair["trl"][key] for key in ("seconds", "cpu_seconds", "peak_mb")
        )
        counts = f"{algorithm} pair {number + 1}/{args.pairs}"
        peer = "ppo.py" if beside_ppo else "TRL"
        print(
            f"{counts}: step {step:.2f}, its CPU time {cpu:.2f}, peak memory {memory:.2f} of {peer}'s",
            flush=True,
        )
    row = compared([{side: pair[side] for side in ("ours", "trl")} for pair in pairs])
    trl = {} if beside_ppo else dict(trl=pairs[0]["trl_record"]["trl"])
    return dict(name=algorithm + " (beside ppo.py)" * beside_ppo, losses=losses, **trl, **row)


def about(args: Args) -> dict:
    """What a reader must know of the run."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    machine = torch.cuda.get_device_name() if args.device == "auto" and torch.cuda.is_available() else cpu
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return dict(machine=machine, **versions, commit=commit(), date=f"{datetime.date.today()}")


def main(args: Args) -> None:
    for name in args.only:
        if name not in PEERS:
            fail(f"--only {name}: no such row; there are {', '.join(PEERS)}")
    if args.scaling:
        return scaling.main(args, sys.modules[__name__])
    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu"
    rows = []
    for algorithm in args.only:
        rows.append(measure(algorithm, args, device))
        if "refused" in rows[-1]:
            print(f"{algorithm}: {rows[-1]['refused']}", flush=True)
    trl = " and ".join(sorted({row["trl"] for row in rows if "trl" in row}))
    said = about(args) | dict(size=args.size, pairs=args.pairs, steps=args.steps, trl=trl)
    text = table(rows, device == "cpu") + "\n\n" + ", ".join(f"{key} {value}" for key, value in said.items())
    Path(args.out).mkdir(parents=True, exist_ok=True)
    Path(args.out, f"{args.size}.json").write_text(json.dumps(dict(about=said, rows=rows), indent=1))
    Path(args.out, f"{args.size}.md").write_text(text + "\n")
    print(text)
    if any("refused" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
