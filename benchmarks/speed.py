"""Our scripts compared with TRL's trainers at matched work: one command, one table, everything paired in one
run.

    python benchmarks/speed.py --size tiny                 # minutes on a CPU
    python benchmarks/speed.py --size 100m                 # an hour or two on one CPU thread
    python benchmarks/speed.py --size 1b                   # one GPU, bf16
    python benchmarks/speed.py --size tiny --only grpo dpo --pairs 3
    python benchmarks/speed.py --scaling --steps 2         # our own cost as the work grows; see scaling.py

GRPO, DPO, KTO, SFT and the reward model against the installed `trl`; PPO against trl 1.12.0, the last release
with a PPO trainer, in an environment that the script makes under --envs (once; with the torch and
transformers of this one).

Both sides get the same random model from one folder, the same rows in the same order, the same batch,
micro-batch, group, epochs, AdamW, rate, clipping, KL coefficient and reference, float32 on a CPU and float32
weights with bf16 compute on a GPU, a line of log a step to files, no evaluation and no checkpoint. Each run
is a process of its own (speed_side.py says what is timed, and what is not TRL's default). Runs come in pairs,
first one side then the other, turned round in the next pair. A ratio is of the medians over the steps of a
pair, its first step left out; the table shows the median over pairs and the range. Peak memory is above what
the imports take, until the end of the last step; on a GPU, what torch has allocated.

A row is refused where the losses of the first step differ. The policy is not the reference, so no loss is a
constant. What is sampled differs between two libraries: for GRPO and PPO our functions compute the loss of
TRL's own first rollout. The random model ends its responses when their prompts say (see `make_models`): those
of `grpo` and `ppo` all reach the limit, those of `grpo-ragged` and `ppo-ragged` end at lengths that vary from
prompt to prompt, the same on both sides to the token.
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
from types import MethodType, SimpleNamespace
from typing import Literal, NamedTuple

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
import scaling

import grpo
import ppo
from common.batches import batch_indices, collate
from common.cli import fail
from common.data import prompt_hash
from common.logprobs import OutputForm, response_logprobs
from common.tables import markdown
from common.value_heads import response_values, sequence_scores
from tools.jobs import commit

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
# The rows of the table, and what each is compared with: TRL as it is installed (''), an older TRL, or our own
# ppo.py.
PEERS = {
    "grpo": "",
    "grpo-ragged": "",
    "dpo": "",
    "kto": "",
    "sft": "",
    "reward": "",
    "ppo": "1.12.0",
    "ppo-ragged": "1.12.0",
    "dvpo": "ppo.py",
    "dvpo-ragged": "ppo.py",
}
ONLINE = ("grpo", "ppo", "dvpo")
LR = 1e-6
BETA = {"grpo": 0.2, "ppo": 0.05, "dvpo": 0.05, "dpo": 0.1, "kto": 0.1}


class Names(NamedTuple):
    """Of one metric, in our log and in theirs."""

    ours: str
    theirs: str


LOGGED = {  # what is compared
    "grpo": Names("policy/loss", "loss"),
    "ppo": Names("objective/kl", "objective/kl"),
    "dvpo": Names("objective/kl", "loss"),
    "dpo": Names("dpo/loss", "loss"),
    "kto": Names("kto/loss", "loss"),
    "sft": Names("sft/loss", "loss"),
    "reward": Names("reward/loss", "loss"),
}
FIELDS = {  # of the rows, after the prompt
    "sft": ["response"],
    "kto": ["response"],
    "dpo": ["chosen", "rejected"],
    "reward": ["chosen", "rejected"],
}
# The model's configuration; then, for each kind of work: tokens of the typical prompt, tokens of the longest
# response (offline:
# the typical one has a third of that), sequences per step (dpo, reward: pairs), sequences per forward pass.
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
    """Model and batches; 1b and 3b are for a GPU."""
    only: tuple[str, ...] = tuple(PEERS)
    """Rows of the table."""
    pairs: int = 5
    """Runs of each side."""
    steps: int = 4
    """Timed steps of a run; one more goes before them."""
    out: str = "runs/speed"
    """Folder of the models, data, logs and the table."""
    envs: str = "runs/envs"
    """Folder of the environments that are made here and kept."""
    pip_arguments: tuple[str, ...] = ()
    """For such an environment, e.g. `--pip-arguments=--index-url=https://download.pytorch.org/whl/cpu`."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    scaling: bool = False
    """Instead: our own cost as the work grows (scaling.py), a table and a picture."""


def script_of(algorithm: str) -> str:
    """The script that a row of the table runs: of grpo-ragged it is grpo."""
    return algorithm.removesuffix("-ragged")


# --- the same models and data for both sides ----------------------------------------------------------------


def token_kinds(vocab: int, limit: int) -> list[int]:
    """What each token is: 0, a plain word; c >= 1, a word of a response that has c tokens left to come, its
    eos among them; -1, special. Half of the words are plain."""
    words = vocab - len(SPECIAL)
    words_per_kind = words // (2 * limit)
    plain = words - words_per_kind * limit
    kinds = [-1] * len(SPECIAL) + [0] * plain
    for kind in range(1, limit + 1):
        kinds += [kind] * words_per_kind
    return kinds


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Made-up words, each a token: w4, w5 and so on."""
    words = SPECIAL + [f"w{i}" for i in range(len(SPECIAL), vocab)]
    ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def make_models(out: Path, shape: dict, limit: int) -> dict[str, str]:
    """Folders of a policy, a reference, a reward and a value model, random Llamas with one tokenizer of
    made-up words.

    An untrained model never ends a response, or nobody knows when. In this one the embedding of a word
    carries the code of its kind, and the output layer prefers what may follow: a plain word after a plain
    one, so responses go on for ever; after a word of kind c one of kind c - 1, after kind 1 eos, so a prompt
    that ends in kind n has responses of n tokens, whatever is sampled. It changes numbers in the weights and
    nothing in the work. The noise in the policy's output layer is greater than in the reference's: there is a
    KL to measure, and KTO's estimate of it on mismatched pairs is below 0 on every micro-batch and thus
    clamped on both sides (TRL takes it of a micro-batch, we of the batch: the losses would differ).
    """
    paths = {name: str(out / name) for name in ("policy", "reference", "reward", "gvm")}
    # the 3 is this function's own version: models made by another are made anew
    key = json.dumps([shape, limit, 3])
    if (out / "key").exists() and (out / "key").read_text() == key:
        return paths
    vocab = shape["vocab_size"]
    width = shape["hidden_size"]

    torch.manual_seed(0)
    config = LlamaConfig(
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **shape,
    )
    model = LlamaForCausalLM(config)
    # a code per kind 0 to limit, and a last one of zeros (also reached as -1) for what nothing leads to
    codes = F.normalize(torch.randn(limit + 2, width), dim=1)
    codes[-1] = 0
    kinds = torch.tensor(token_kinds(vocab, limit))
    # the kind of the word that each word follows: a plain one follows a plain one, kind c follows kind c + 1
    before = torch.where(kinds == 0, 0, kinds + 1)
    before = torch.where((kinds < 0) | (kinds == limit), limit + 1, before)
    before[2] = 1  # eos comes after kind 1
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings.normal_(0, 10)  # words differ, or every reward would be the same
        embeddings[2] /= 1000  # what a reward model reads at eos is what went before
        embeddings += 20 * width**0.5 * codes[kinds]
        for name, noise in (("policy", 1.0), ("reference", 0.1)):
            model.lm_head.weight.normal_(0, noise / width**0.5)
            model.lm_head.weight += 30 / width**0.5 * codes[before]
            model.save_pretrained(paths[name])
        one_label = config.to_dict() | {"num_labels": 1}
        scorer = LlamaForSequenceClassification(LlamaConfig(**one_label))
        scorer.model = model.model
        scorer.score.weight.normal_(0, 1 / width**0.5)
        scorer.save_pretrained(paths["reward"])
        valuer = LlamaForTokenClassification(LlamaConfig(**one_label | {"classifier_dropout": 0.0}))
        valuer.model = model.model
        valuer.score.weight = scorer.score.weight
        valuer.save_pretrained(paths["gvm"])
    tokenizer = make_tokenizer(vocab)
    for path in paths.values():
        tokenizer.save_pretrained(path)
    (out / "key").write_text(key)
    return paths


def make_rows(algorithm: str, size: dict, steps: int, vocab: int, limit: int) -> list[dict]:
    """Rows enough for `steps`, of lengths with a log-normal spread (sigma 0.6), as in real data."""
    generator = torch.Generator().manual_seed(1)
    kinds = token_kinds(vocab, limit)
    plain = [i for i, kind in enumerate(kinds) if kind == 0]
    script = script_of(algorithm)

    def length(typical: int, most: int) -> int:
        drawn = typical * math.exp(0.6 * torch.randn((), generator=generator).item())
        return int(min(most, max(2, drawn)))

    def text(words: int) -> str:
        drawn = torch.randint(len(plain), (words,), generator=generator).tolist()
        return " ".join(f"w{plain[i]}" for i in drawn)

    rows = []
    for i in range(rows_per_step(size) * steps):
        row = {"prompt": text(length(size["prompt"], 4 * size["prompt"]))}
        if algorithm.endswith("-ragged"):
            kind = length(limit // 3, limit)
            row["prompt"] += f" w{kinds.index(kind)}"
        for key in FIELDS.get(script, ()):
            row[key] = text(length(size["response"] // 3, size["response"] - 1))
        if script == "kto":
            row["label"] = i % 2 == 0
        rows.append(row)
    return rows


def rows_per_step(size: dict) -> int:
    """Rows of data that a step reads: of GRPO's groups the prompt alone."""
    return size["batch"] // size.get("group", 1)


def write_rows(path: Path, rows: list[dict]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def in_drawn_order(rows: list[dict], algorithm: str, a_step: int) -> list[dict]:
    """The rows as our script draws them with seed 0, `a_step` each step: TRL is told not to shuffle."""
    if script_of(algorithm) in ONLINE:  # they sort prompts by a hash, to hold some out
        rows = sorted(rows, key=lambda row: prompt_hash(row["prompt"], 1))
    drawn = []
    for step in range(len(rows) // a_step):
        drawn += [rows[i] for i in batch_indices(len(rows), a_step, step, 0)]
    return drawn


def our_arguments(
    algorithm: str, paths: dict, files: dict, size: dict, steps: int, run_dir: Path
) -> list[str]:
    """The command line of our script."""
    script = script_of(algorithm)
    flags = {
        "dataset": files["ours"],
        "run_dir": run_dir,
        "steps": steps,
        "batch_size": size["batch"],
        "micro_batch_size": size["micro"],
        "lr": LR,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "max_prompt_length": 100_000,
        "eval_every": 0,
        "save_every": 0,
        "model": paths["reward"] if script == "reward" else paths["policy"],
        "max_response_length": size["response"],
    }
    if script in BETA:
        flags["beta"] = BETA[script]
        flags["ref_model"] = paths["reference"]
    if script in ONLINE:
        flags["mini_batch_size"] = size["batch"]
        flags["epochs"] = size.get("epochs", 1)
        flags["eval_prompts"] = 0
    else:
        flags["eval_dataset"] = files["eval"]
        if script != "reward":
            flags["eval_prompts"] = 0
    if script == "ppo":
        flags["reward"] = paths["reward"]
        flags["critic_lr"] = LR
    elif script == "dvpo":
        flags["gvm"] = paths["gvm"]
    elif script == "grpo":
        flags["group_size"] = size["group"]
        flags["reward"] = "benchmarks.speed_side:reward"
        flags["aggregation"] = "grpo"
    words = []
    for name, value in flags.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return [*words, "--overwrite"]


# --- running ------------------------------------------------------------------------------------------------


def python_with_trl(version: str, args: Args) -> str:
    """The interpreter that has TRL: this one, or that of an environment made here, with the same torch and
    transformers."""
    if not version and find_spec("trl"):
        return sys.executable
    version = version or "1.16.0"
    folder = Path(args.envs, f"trl-{version}").absolute()
    python = folder / "bin/python"
    stamp = folder / "installed"  # written last: an interrupted installation is done again
    if not stamp.exists():
        print(f"making {folder}, once", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        wanted = [f"trl=={version}", "tensorboard"]
        for name in ("torch", "transformers", "datasets", "numpy"):
            wanted.append(f"{name}=={release(metadata.version(name))}")
        done = subprocess.run([str(python), "-m", "pip", "install", "-q", *args.pip_arguments, *wanted])
        if done.returncode:
            fail(f"pip could not install {' '.join(wanted)} in {folder}; see --pip-arguments")
        stamp.touch()
    return str(python)


def release(version: str) -> str:
    """A version without what it was built for: 2.13.0 of 2.13.0+cpu."""
    return version.split("+")[0]


def run_side(python: str, spec: dict, log: Path) -> dict:
    """Runs one process; its record, or {"error": one line}."""
    out = Path(spec["out"])
    out.unlink(missing_ok=True)
    file = out.with_suffix(".spec.json")
    file.write_text(json.dumps(spec))
    environment = dict(os.environ)
    if spec["device"] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [python, str(ROOT / "benchmarks/speed_side.py"), str(file)]
    with open(log, "w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=stream, cwd=ROOT, env=environment).returncode
    if code:
        lines = log.read_text().strip().splitlines() or [f"exit {code}"]
        return {"error": f"{spec['side']} failed: {lines[-1][:200]} (see {log})"}
    return json.loads(out.read_text())


def replayed_loss(script: str, record: dict, paths: dict, size: dict, device: str) -> float:
    """What our functions make of TRL's first rollout: GRPO's loss, or, of PPO, whose first policy loss is 0,
    the critic's."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pad = 0
    first = record["first"]
    sequences = list(zip(first["prompt"], first["completion"], strict=True))
    mask = collate(sequences, pad, device)["response_mask"]  # [N, T]

    def load(path: str, auto=AutoModelForCausalLM):
        return auto.from_pretrained(path, dtype=dtype).to(device).eval()

    @torch.no_grad()
    def for_all(forward, width: int) -> torch.Tensor:
        """[N, width] of all sequences, a micro-batch at a time."""
        out = torch.zeros(len(sequences), width, device=device)
        for start in range(0, len(sequences), size["micro"]):
            end = start + size["micro"]
            found = forward(collate(sequences[start:end], pad, device)).float()
            out[start:end, : found.shape[1]] = found
        return out

    def logprobs_of(path: str) -> torch.Tensor:
        """[N, T]"""
        model = load(path)
        model.forbidden_tokens = None
        model.output_form = OutputForm()
        model.response_logprobs = MethodType(response_logprobs, model)

        def forward(mb):
            return model.response_logprobs(**mb)[0]

        return for_all(forward, mask.shape[1])

    logprobs = logprobs_of(paths["policy"])
    ref_logprobs = logprobs_of(paths["reference"])
    if script == "grpo":
        rewards = torch.tensor(first["rewards"], device=device)
        advantages = grpo.group_advantages(rewards, size["group"])[0][:, None]
        weights = grpo.token_weights(mask, "grpo", size["response"])
        loss, _ = grpo.surrogate_loss(logprobs, logprobs, advantages, weights, mask, 0.2, 0.2)
        kl = grpo.kl_estimates(logprobs, ref_logprobs, mask)[1]
        return (loss + BETA["grpo"] * (kl * weights).sum()).item()

    critic = load(paths["reward"], AutoModelForSequenceClassification)
    trunk = critic.model
    head = critic.score

    def score(mb):
        return sequence_scores(critic, **mb)

    def values_of(mb):
        """TRL's critic starts as the reward model, which has a head for the last token: here it reads every
        token."""

        def forward(input_ids, use_cache):
            hidden = trunk(input_ids=input_ids, use_cache=use_cache).last_hidden_state
            return SimpleNamespace(logits=head(hidden))

        return response_values(forward, **mb)

    rewards = for_all(score, 1)[:, 0]  # [N]
    values = for_all(values_of, mask.shape[1] + 1)[:, :-1]  # [N, T], of the states before each token
    kl, _ = ppo.kl_estimates(logprobs, ref_logprobs, mask)
    token_rewards = ppo.token_rewards(kl, rewards, mask, BETA["ppo"])
    advantages = ppo.gae(token_rewards, values, mask, 1.0, 0.95)
    loss = ppo.value_loss(values, values, advantages + values, mask, 0.2)
    return (loss / mask.sum()).item()


# --- the table ----------------------------------------------------------------------------------------------


def differences(numbers: list[float]) -> list[float]:
    """Between neighbours."""
    return [after - before for before, after in zip(numbers, numbers[1:], strict=False)]


def summary(record: dict, work: dict) -> dict:
    """A run in numbers: medians over its steps but the first. `work`: what `work_of` gives."""
    ends = [step["at"] for step in record["steps"]]
    seconds = statistics.median(differences(ends))
    cpu_seconds = statistics.median(differences([step["cpu"] for step in record["steps"]]))
    out = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": record["peak_mb"]}
    # none after the last step, nor in the first
    rollouts = [rollout for rollout in record["rollouts"] if ends[0] < rollout["at"] <= ends[-1]]
    if not rollouts:
        out["update_tokens_s"] = work["tokens"] / seconds
        return out
    steps = len(ends) - 1
    lengths = [length for rollout in rollouts for length in rollout["lengths"]]
    made = sum(lengths) / steps  # tokens per step
    spent = sum(rollout["seconds"] for rollout in rollouts) / steps
    updated = work["epochs"] * (made + work["prompt_tokens"])
    out["length"] = statistics.fmean(lengths)
    out["rollout_tokens_s"] = made / spent
    out["update_tokens_s"] = updated / (seconds - spent)
    return out


def work_of(rows: list[dict], size: dict, steps: int) -> dict:
    """What a step does, in tokens: `prompt_tokens` of the prompts, `tokens` of all that the data hold."""
    a_step = rows_per_step(size)
    copies = size.get("group", 1)
    if "chosen" in rows[0]:
        copies *= 2  # the prompt stands before either response
    prompt_tokens = (words_per_step(rows, "prompt", steps) + a_step) * copies  # and a bos each
    response_tokens = 0
    for key in ("response", "chosen", "rejected"):
        if key in rows[0]:
            response_tokens += words_per_step(rows, key, steps) + a_step  # and an eos each
    tokens = prompt_tokens + response_tokens
    return {"epochs": size.get("epochs", 1), "prompt_tokens": prompt_tokens, "tokens": tokens}


def words_per_step(rows: list[dict], key: str, steps: int) -> float:
    """Words of a field of the data."""
    return sum(len(row[key].split()) for row in rows) / steps


def disagreement(ours: float, theirs: float, tolerance: float, what: str = "losses") -> str:
    """'' where two numbers agree, else why the row is not comparable."""
    finite = math.isfinite(ours) and math.isfinite(theirs)
    if finite and abs(ours - theirs) <= tolerance * max(abs(ours), abs(theirs)):
        return ""
    return f"not comparable: {what} {ours:.5g} and {theirs:.5g}"


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
    """Markdown. Ratios are ours over TRL's: median over pairs (smallest to greatest). On a CPU a step's own
    CPU time tells whether anything else ran at the same time."""

    def ratio(values: list[float]) -> str:
        median, least, most = values
        return f"{median:.2f} ({least:.2f}-{most:.2f})"

    def both(row: dict, key: str, form: str) -> str:
        if "ours_" + key not in row:
            return "-"
        return f"{row['ours_' + key]:{form}} / {row['trl_' + key]:{form}}"

    head = ["", "s a step, ours / TRL", "ratio", "rollout tokens/s", "update tokens/s"]
    head += ["peak MB", "ratio", "first loss"]
    lines = []
    shares = []  # of its time that a step had a CPU
    for row in rows:
        if "refused" in row:
            lines.append([row["name"], row["refused"], *[""] * 6])
            continue
        our_loss, their_loss = row["losses"]
        cells = [
            row["name"],
            both(row, "seconds", ".3g"),
            ratio(row["ratio_seconds"]),
            both(row, "rollout_tokens_s", ",.0f"),
            both(row, "update_tokens_s", ",.0f"),
            both(row, "peak_mb", ",.0f"),
            ratio(row["ratio_peak_mb"]),
            f"{our_loss:.5g} / {their_loss:.5g}",
        ]
        lines.append(cells)
        shares.append(row["ours_cpu_seconds"] / row["ours_seconds"])
        shares.append(row["trl_cpu_seconds"] / row["trl_seconds"])
    text = markdown(head, lines)
    if cpu and shares and min(shares) < 0.9:
        busy = f"The machine was busy with other work: a step had a CPU for {min(shares):.0%} of its time."
        text += f"\n\n{busy} Measure again."
    return text


def measure(algorithm: str, args: Args, device: str) -> dict:
    """One row of the table."""
    script = script_of(algorithm)
    beside_ppo = PEERS[algorithm] == "ppo.py"
    shape = SIZES[args.size]
    if script in ("ppo", "dvpo"):
        size = shape["ppo"]
        limit = shape["ppo"]["response"]
    elif script == "grpo":
        size = shape["grpo"]
        limit = shape["grpo"]["response"]
    else:
        size = shape["offline"]
        limit = shape["grpo"]["response"]  # the models are GRPO's
    out = Path(args.out, args.size).absolute()
    steps = args.steps + 1  # the first is not timed

    models_folder = out / f"models-{limit}"
    models_folder.mkdir(parents=True, exist_ok=True)
    paths = make_models(models_folder, shape["model"], limit)
    rows = make_rows(algorithm, size, steps, shape["model"]["vocab_size"], limit)
    files = {side: str(out / f"{algorithm}-{side}.jsonl") for side in ("ours", "trl", "eval")}
    write_rows(Path(files["ours"]), rows)
    write_rows(Path(files["trl"]), in_drawn_order(rows, algorithm, rows_per_step(size)))
    write_rows(Path(files["eval"]), rows[:2])
    work = work_of(rows, size, steps)
    pythons = {"ours": sys.executable, "trl": sys.executable}
    if not beside_ppo:
        pythons["trl"] = python_with_trl(PEERS[algorithm], args)

    pairs = []  # of summaries
    first_losses = None
    for number in range(args.pairs):
        records = {}
        sides = ("ours", "trl")
        if number % 2:
            sides = ("trl", "ours")  # turned round, so that neither always runs on the warmer machine
        for side in sides:
            stem = out / f"{algorithm}-{number}-{side}"
            spec = {
                "side": side,
                "device": device,
                "out": f"{stem}.json",
                "run_dir": str(stem),
                "size": size,
                "steps": steps,
                "lr": LR,
                "algorithm": script,
                "script": script,
                "beta": BETA.get(script, 0.0),
                "rows": files["trl"],
                "model": paths["policy"],
                "ref_model": paths["reference"],
                "reward_model": paths["reward"],
                "arguments": our_arguments(algorithm, paths, files, size, steps, stem),
            }
            if side == "trl" and beside_ppo:
                spec["side"] = "ours"
                spec["script"] = "ppo"
                spec["arguments"] = our_arguments("ppo", paths, files, size, steps, stem)
            record = run_side(pythons[side], spec, Path(f"{stem}.log"))
            shutil.rmtree(stem, ignore_errors=True)
            if "error" in record:
                return {"name": algorithm, "refused": record["error"]}
            records[side] = record
        pair = {side: summary(record, work) for side, record in records.items()}

        our_logged, their_logged = logged_of(script, records, beside_ppo)
        if first_losses is None:
            if script in ("grpo", "ppo"):
                ours = replayed_loss(script, records["trl"], paths, size, device)
            else:
                ours = our_logged[0]
            if script == "ppo":
                # TRL's PPO gives the score one token after eos; with a critic that starts as the reward model
                # it is
                # all the same
                theirs = records["trl"]["first"]["value_loss"]
            else:
                theirs = their_logged["loss"][0]
            first_losses = [ours, theirs]
        why = why_not_comparable(script, records, pair, first_losses, our_logged, their_logged, device)
        if why:
            return {"name": algorithm, "refused": why}
        pairs.append(pair)

        peer = "ppo.py" if beside_ppo else "TRL"
        ratio = {key: pair["ours"][key] / pair["trl"][key] for key in ("seconds", "cpu_seconds", "peak_mb")}
        times = f"step {ratio['seconds']:.2f}, its CPU time {ratio['cpu_seconds']:.2f}"
        ratios = f"{times}, peak memory {ratio['peak_mb']:.2f} of {peer}'s"
        print(f"{algorithm} pair {number + 1}/{args.pairs}: {ratios}", flush=True)
    row = {"name": algorithm, "losses": first_losses}
    if beside_ppo:
        row["name"] += " (beside ppo.py)"
    else:
        row["trl"] = records["trl"]["trl"]
    return row | compared(pairs)


def logged_of(script: str, records: dict, beside_ppo: bool) -> tuple[list[float], dict[str, list[float]]]:
    """What each side logged at each step: of ours what is compared, of the other by its name there."""
    key = LOGGED[script].ours
    ours = [step["metrics"][key] for step in records["ours"]["steps"]]
    if not beside_ppo:
        return ours, records["trl"]["logged"]
    # the same samples, as they are drawn by the same numbers
    theirs = [step["metrics"][key] for step in records["trl"]["steps"]]
    return ours, {"loss": theirs}


def why_not_comparable(
    script: str,
    records: dict,
    pair: dict,
    first_losses: list[float],
    our_logged: list[float],
    their_logged: dict[str, list[float]],
    device: str,
) -> str:
    """'' where the two sides of a pair did the same work, else what differs."""
    our_torch = release(records["ours"]["versions"]["torch"])
    their_torch = release(records["trl"]["versions"]["torch"])
    if our_torch != their_torch:
        return "not comparable: two versions of torch"
    ours, theirs = first_losses
    tolerance = 1e-3 if device == "cpu" else 0.03  # bf16 on a GPU
    why = disagreement(ours, theirs, tolerance)
    if script in ("grpo", "ppo"):
        # and what our script itself logs, of its own samples, is the same but for chance
        our_mean = statistics.fmean(our_logged)
        their_mean = statistics.fmean(their_logged[LOGGED[script].theirs])
        why = why or disagreement(our_mean, their_mean, 0.25, f"mean {LOGGED[script].ours}")
    if "length" in pair["ours"]:
        why = why or disagreement(pair["ours"]["length"], pair["trl"]["length"], 0.02, "mean lengths")
    return why


def about(args: Args) -> dict:
    """What a reader must know of the run."""
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    if device_of(args) == "cuda":
        machine = torch.cuda.get_device_name()
    return {
        "machine": machine,
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "commit": commit(),
        "date": f"{datetime.date.today()}",
    }


def device_of(args: Args) -> str:
    """cuda or cpu."""
    if args.device == "auto" and torch.cuda.is_available():
        return "cuda"
    return "cpu"


def main(args: Args) -> None:
    for name in args.only:
        if name not in PEERS:
            fail(f"--only {name}: no such row; there are {', '.join(PEERS)}")
    if args.scaling:
        scaling.main(args, sys.modules[__name__])
        return
    device = device_of(args)
    rows = []
    for algorithm in args.only:
        row = measure(algorithm, args, device)
        if "refused" in row:
            print(f"{algorithm}: {row['refused']}", flush=True)
        rows.append(row)
    trl_versions = sorted({row["trl"] for row in rows if "trl" in row})
    said = about(args)
    said["size"] = args.size
    said["pairs"] = args.pairs
    said["steps"] = args.steps
    said["trl"] = " and ".join(trl_versions)
    note = ", ".join(f"{key} {value}" for key, value in said.items())
    text = table(rows, cpu=device == "cpu") + "\n\n" + note
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{args.size}.json").write_text(json.dumps({"about": said, "rows": rows}, indent=1))
    (out / f"{args.size}.md").write_text(text + "\n")
    print(text)
    if any("refused" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
