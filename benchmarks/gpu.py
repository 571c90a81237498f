"""Everything that this project wants to know from one GPU, in pieces of a few minutes that run in any order.

    python benchmarks/gpu.py list                        # the pieces, a line each
    python benchmarks/gpu.py correct                     # the GPU's numbers against the CPU's
    python benchmarks/gpu.py update                      # tokens/s and MFU of the update, 1B and 3B
    python benchmarks/gpu.py decode                      # our rollout against the memory's bandwidth
    python benchmarks/gpu.py steps                       # DVPO, PPO, GRPO: seconds, and memory beside its plan
    python benchmarks/gpu.py learn --model Qwen2.5-0.5B-Instruct --prompts questions.jsonl \\
        --reward my_rewards:correct --gvm runs/gvm_td/model
    python benchmarks/gpu.py page                        # what was measured, as Markdown
    python benchmarks/gpu.py all --dry-run               # every piece on a CPU with tiny models, a minute

A piece writes `<out>/<piece>.json` after every measurement, so a GPU that goes away early leaves what it has
measured. Nothing needs a network: models get random weights in published shapes, texts are made of made-up
words. Flags that are not listed by --help go to the script, in `steps` and `learn`. docs/gpu.md says what each
number is.
"""

import contextlib
import functools
import gc
import json
import os
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import transformers
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "benchmarks")]
import sampler
import speed

import dvpo
import grpo
import ppo
from common import distributed, meter, vllm
from common import rollout as rollout_room
from common.batches import collate, micro_batches, response_mask, run_micro_batches
from common.cli import fail, parse
from common.models import AUTO, load_model
from common.optimizer import accumulated, adamw, backward, optimizer_step
from common.tables import markdown
from common.tokenization import encode_prompt, load_tokenizer
from common.value_heads import response_values
from tools import plan_memory
from tools.plan_memory import GB, Enough

SCRIPTS = {"dvpo": dvpo, "ppo": ppo, "grpo": grpo}
# The published shapes behind the short names of --model.
SIZES = {"0.5B": "Qwen2.5-0.5B", "1B": "Llama-3.2-1B", "3B": "Llama-3.2-3B"}
# What a dry run puts in place of each.
TINY = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,  # as in all of SIZES
)
EVERY = 25  # steps of `learn` between evaluations, and between checkpoints
SAVING = 30.0  # seconds that `learn` keeps for its last checkpoint and an evaluation
REWARD = "benchmarks.speed_side:reward"  # costs nothing, and differs from response to response


@dataclass
class Options:
    piece: tyro.conf.Positional[str]
    """A piece's name, or list, page, or (with --dry-run) all."""
    model: str = ""
    """Folder of a model, or 0.5B, 1B or 3B for random weights in that shape; each piece has its own default."""
    out: str = "runs/gpu"
    """Folder of the results, one JSON file per piece."""
    work: str = "runs/gpu-work"
    """Folder of the models, data and runs that are made here; it may be deleted."""
    limit: float = 500.0
    """Seconds after which a piece stops and keeps what it has."""
    dry_run: bool = False
    """Use a CPU and tiny sizes: it shows that a piece runs, and its numbers mean nothing."""
    only: tuple[str, ...] = ("grpo", "dvpo", "ppo")
    """Scripts of `steps` and `learn`."""
    steps: int = 0
    """RL steps of each script in `steps` (by default 4) and `learn` (by default 200)."""
    prompts: str = ""
    """Prompts that `learn` trains on: a file or hub id with a column `prompt`."""
    reward: str = ""
    """Reward that `learn` trains on: `module:function`, or a reward model's folder."""
    gvm: str = ""
    """Global Value Model of DVPO in `learn`; without one DVPO is left out."""


# --- what is written ----------------------------------------------------------------------------------------


@dataclass
class Record:
    """The results of one piece: tables of rows, each a dict of cells. The file is written after every row."""

    piece: str
    options: Options
    flags: list[str]
    """the script's own"""
    words: list[str]
    """the command line"""
    tables: dict[str, list[dict]] = field(default_factory=dict)
    curves: dict[str, list[dict]] = field(default_factory=dict)
    """metrics by script, of `learn`"""
    notes: list[str] = field(default_factory=list)
    complete: bool = False
    begin: float = field(default_factory=time.perf_counter)

    def __post_init__(self):
        about = speed.about(SimpleNamespace(device="auto"))
        self.about = {"device": about.pop("machine"), **about}
        if torch.cuda.is_available():
            self.about["device_gb"] = torch.cuda.get_device_properties(0).total_memory / GB
            self.about["cuda"] = torch.version.cuda

    @property
    def dry(self) -> bool:
        return self.options.dry_run

    def seconds(self) -> float:
        """Since the piece began."""
        return time.perf_counter() - self.begin

    def row(self, table: str, row: dict) -> None:
        """Adds a row to a table, prints it and writes the file."""
        self.tables.setdefault(table, []).append(row)
        cells = [f"{key} {in_digits(cell)}" for key, cell in row.items()]
        print(f"{self.piece}, {table}: {', '.join(cells)}", flush=True)
        self.write()

    def note(self, text: str) -> None:
        """Adds a line for the reader, prints it and writes the file."""
        self.notes.append(text)
        print(f"{self.piece}: {text}", flush=True)
        self.write()

    def write(self) -> None:
        """<out>/<piece>.json: first under another name, so that no half of it is left."""
        out = Path(self.options.out)
        out.mkdir(parents=True, exist_ok=True)
        found = {
            "piece": self.piece,
            "dry_run": self.dry,
            "complete": self.complete,
            "command": shlex.join(["python", "benchmarks/gpu.py", *self.words]),
            "seconds": round(self.seconds(), 1),
            **self.about,
            "notes": self.notes,
            "tables": self.tables,
        }
        if self.curves:
            found["curves"] = self.curves
        part = out / f"{self.piece}.part"
        part.write_text(json.dumps(found, indent=1))
        part.rename(out / f"{self.piece}.json")


def in_digits(cell) -> str:
    """A cell as a table shows it: four digits of a number."""
    if cell is None:
        return "-"
    if isinstance(cell, float) and abs(cell) >= 1000:
        return f"{cell:,.0f}"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)


# --- time and memory ----------------------------------------------------------------------------------------


class OutOfTime(BaseException):
    """The limit is reached. No Exception, so that nothing on the way catches it."""


def start_clock(seconds: float) -> None:
    """From then on OutOfTime is raised, again every five seconds: where Python swallows the first (in a
    destructor, say), the next one comes through."""

    def ring(*_):
        raise OutOfTime

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)


def stop_clock() -> None:
    """No OutOfTime is raised any more."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def now() -> float:
    """Seconds, when the GPU has done what it was told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes on the device."""
    start = now()
    work()
    return now() - start


def free() -> None:
    """Gives back what no one holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def launched(main: Callable, args) -> None:
    """`main(args)` in a process group of this process alone.

    What ends it early is raised again only when its models and its group are gone: a traceback would hold
    the models, and FSDP's must go first.
    """
    ended = []

    def guarded(args):
        try:
            main(args)
        except (OutOfTime, Enough, torch.OutOfMemoryError) as error:
            if isinstance(error, OutOfTime):
                stop_clock()
            ended.append(type(error))

    distributed.launch(guarded, args)
    free()
    if ended:
        raise ended[0]


def in_group(work: Callable[[], None]) -> None:
    """`work` in a process group of this process alone."""

    def main(_):
        work()

    launched(main, SimpleNamespace(timeout_minutes=60.0, seed=0, shard_size=0))


def nothing(*_, **__) -> None:
    """In place of an export."""


def run_script(name: str, words: list[str], export: bool) -> None:
    """A script's main with the command line `words`, in this process. `export`: its model, at the end."""
    script = SCRIPTS[name]
    args = parse(script.Args, script.REVIEWS, words)
    replaced = contextlib.nullcontext()
    if not export:
        replaced = mock.patch.object(script, "export", nothing)
    with replaced:
        launched(script.main, args)


def logged(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; none where there is no run."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def steps_of(folder: Path) -> list[dict]:
    """The lines of a run's steps: the others are evaluations."""
    return [line for line in logged(folder) if "time/step_s" in line]


# --- models and data that need no network -------------------------------------------------------------------


def model_options(precision: str, checkpointing: bool = False) -> SimpleNamespace:
    """What load_model reads of a script's Args."""
    return SimpleNamespace(
        precision=precision, shard_size=0, gradient_checkpointing=checkpointing, lora_rank=0
    )


def policy_folder(record: Record, name: str) -> str:
    """A policy's folder: `name` is one, or a size, of which one with random weights is made."""
    if record.dry:
        config = transformers.LlamaConfig(**TINY)
        return random_model(record, "policy", "tiny", config, None)
    if name in SIZES:
        config = plan_memory.find_config(SIZES[name])
        return random_model(record, "policy", name, config, None)
    return name  # `checked_options` has looked


def value_folder(record: Record, kind: str, policy: str) -> str:
    """A value or reward model's folder, random weights in the shape of `policy` and with its tokenizer."""
    config = transformers.AutoConfig.from_pretrained(policy)
    config.num_labels = 1
    return random_model(record, kind, Path(policy).name, config, policy)


def random_model(record: Record, kind: str, name: str, config, tokenizer_of: str | None) -> str:
    """A folder of random weights, in bf16: half the bytes to write and to read, and every type holds them.

    `tokenizer_of`: whose tokenizer it gets; None: one of made-up words. A folder made before is used again.
    """
    if tokenizer_of is None:
        tokenizer = speed.make_tokenizer(config.vocab_size)
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_of)
        if config.pad_token_id is None:  # a reward model is read before its padding
            config.pad_token_id = tokenizer.pad_token_id
    if kind == "policy":
        folder = Path(record.options.work, "models", name)
    else:
        folder = Path(record.options.work, "models", f"{name}-{kind}")
    stamp = folder / "made"  # written last
    key = f"{tokenizer_of}\n{config.to_json_string()}"
    if stamp.exists() and stamp.read_text() == key:
        return str(folder)
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    # on the GPU, where there is one: a CPU takes minutes for the random numbers of 3B
    with torch.device(device()):
        model = AUTO[kind].from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stamp.write_text(key)
    del model
    free()
    return str(folder)


def device() -> str:
    """cuda or cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_sequences(vocab: int, shape: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of random tokens, none of them special, of the lengths in `shape`."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return torch.randint(len(speed.SPECIAL), vocab, (length,), generator=generator).tolist()

    return [(draw(prompt), draw(response)) for prompt, response in shape]


def write_prompts(path: Path, tokenizer, number: int, length: int) -> None:
    """A file of different prompts that are as near to `length` tokens as whole words come, never above."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(number):
        words = [f"w{i}" for i in torch.randint(4, 500, (length,), generator=generator).tolist()]
        tokens = len(encode_prompt(tokenizer, " ".join(words)))
        while tokens > length:
            # at first by the ratio, at last one by one
            words = words[: min(len(words) - 1, len(words) * length // tokens)]
            tokens = len(encode_prompt(tokenizer, " ".join(words)))
        rows.append({"prompt": " ".join(words)})
    path.parent.mkdir(parents=True, exist_ok=True)
    speed.write_rows(path, rows)


def words_of(flags: dict) -> list[str]:
    """A command line."""
    words = []
    for name, value in flags.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


# --- one update, as the scripts have it ---------------------------------------------------------------------


def one_update(policy, optimizer, sequences, micro: int, pad: int, lr: float) -> float:
    """A step of GRPO with all advantages 1, which is one of maximum likelihood; the gradient's norm."""
    where = distributed.device()
    mask = response_mask([response for _, response in sequences], where)  # [B, T]
    weights = grpo.token_weights(mask, "dapo", 0)  # [B, T]
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    loss = torch.zeros((), device=where)  # []
    found = micro_batches(range(len(sequences)), lengths, micro, distributed.rank(), distributed.world())
    for mb_indices in accumulated(found, policy):
        mb = collate([sequences[i] for i in mb_indices], pad, where)
        mb_mask = mb["response_mask"]  # [b, t]
        mb_rows = torch.tensor(mb_indices, device=where)  # [b]
        mb_weights = weights[mb_rows, : mb_mask.shape[1]]  # [b, t]
        mb_logprobs, _ = policy.response_logprobs(**mb)  # [b, t]
        mb_advantages = torch.ones_like(mb_logprobs)  # [b, t]
        mb_loss, _ = grpo.surrogate_loss(
            mb_logprobs, mb_logprobs.detach(), mb_advantages, mb_weights, mb_mask, 0.2, 0.2
        )
        backward(mb_loss)
        loss += mb_loss.detach()
    _, norm = optimizer_step(policy, optimizer, lr, loss, 1.0, "the benchmark's update")
    return norm


# --- correct ------------------------------------------------------------------------------------------------


def correct(record: Record) -> None:
    """The GPU's numbers against the CPU's, the sampler against the policy, the ratio before an update."""
    folder = policy_folder(record, record.options.model or "0.5B")
    folders = {"policy": folder, "value": value_folder(record, "value", folder)}
    tokenizer = load_tokenizer(folder)
    first_update(record, folder, tokenizer)
    in_group(functools.partial(compare_sampler, record, folder, tokenizer))
    in_group(functools.partial(compare_devices, record, folders, tokenizer))


def first_update(record: Record, folder: str, tokenizer) -> None:
    """One step of ppo.py whose one update begins with the policy that was scored: a ratio of 1, but for what
    differs between the pass that scores and the pass that trains."""
    batch = 4 if record.dry else 32
    prompt_length = 8 if record.dry else 128
    prompts = Path(record.options.work, "correct.jsonl")
    write_prompts(prompts, tokenizer, 2 * batch, prompt_length)
    run_dir = Path(record.options.work, "correct-ppo")
    shutil.rmtree(run_dir, ignore_errors=True)
    flags = {
        "model": folder,
        "reward": REWARD,
        "dataset": prompts,
        "run_dir": run_dir,
        "steps": 1,
        "epochs": 1,
        "batch_size": batch,
        "mini_batch_size": batch,
        "micro_batch_size": 4,
        "max_prompt_length": prompt_length,
        "max_response_length": 8 if record.dry else 128,
        "eval_every": 0,
        "eval_prompts": 0,
        "save_every": 0,
    }
    run_script("ppo", words_of(flags), export=False)
    (line,) = steps_of(run_dir)
    row = {"script": "ppo"}
    for name in ("policy/ratio", "policy/approx_kl", "policy/clip_fraction", "rollout/mismatch"):
        row[name] = line[name]
    record.row("first update", row)


def compare_sampler(record: Record, folder: str, tokenizer) -> None:
    """The sampler's log-probabilities against the policy's, right and with each known fault."""
    vocab = transformers.AutoConfig.from_pretrained(folder).vocab_size
    shape = [
        (length, 1) for length in ((5, 9, 9, 12) if record.dry else (20, 50, 90, 90, 128, 128, 150, 200))
    ]
    prompts = [prompt for prompt, _ in random_sequences(vocab, shape)]
    tokens = 4 if record.dry else 64
    for precision in ("fp32", "bf16"):
        policy = load_model("policy", folder, tokenizer, model_options(precision), trained=True)
        row = {"device": device(), "precision": precision, "tolerance": rollout_room.tolerance(policy)}
        try:
            rollout_room.check_sampler(policy, tokenizer, prompts, tokens, 1.0)
            row["check_sampler"] = "agrees"
        except SystemExit as refusal:  # that is a result too
            row["check_sampler"] = str(refusal)
        row |= sampler.measure(policy, prompts, tokens, 1.0)
        record.row("sampler", row)
        del policy
        free()


def compare_devices(record: Record, folders: dict[str, str], tokenizer) -> None:
    """Log-probabilities, values and a step's gradient norm, by device and type: how far from the CPU's in
    float64."""
    vocab = transformers.AutoConfig.from_pretrained(folders["policy"]).vocab_size
    shape = [(12, 8), (5, 8), (9, 3), (16, 1)]
    if not record.dry:
        shape = [(96, 64), (40, 64), (72, 24), (128, 8)]
    sequences = random_sequences(vocab, shape)
    settings = [("cpu", "fp64"), ("cpu", "fp32")]
    if device() == "cuda":
        settings += [("cuda", "fp32")]
    settings += [(device(), "bf16")]
    exact = None
    for where, precision in settings:
        found = numbers_of(folders, tokenizer, sequences, where, precision)
        free()
        exact = exact or found
        row = {"device": where, "precision": precision}
        mask = exact["mask"]  # [N, T]
        for name in ("logprobs", "values", "logprobs after"):
            off = (found[name] - exact[name]).abs()[mask]
            row[f"{name}: mean off"] = off.mean().item()
            row[f"{name}: most off"] = off.max().item()
        row["mean logprob"] = found["logprobs"][mask].mean().item()
        row["mean logprob after"] = found["logprobs after"][mask].mean().item()
        row["gradient norm"] = found["norm"]
        row["gradient norm: relative error"] = abs(found["norm"] / exact["norm"] - 1)
        record.row("against float64 on the CPU", row)


def numbers_of(folders: dict[str, str], tokenizer, sequences, where: str, precision: str) -> dict:
    """What one device computes in one type; all tensors [N, T] in float64 on the CPU."""
    pad = tokenizer.pad_token_id
    width = max(len(response) for _, response in sequences)
    place = mock.patch.object(distributed, "device", functools.partial(torch.device, where))
    replaced = place if where == "cpu" else contextlib.nullcontext()
    with replaced:
        distributed.mesh.cache_clear()  # of another device
        options = model_options(precision)
        policy = load_model("policy", folders["policy"], tokenizer, options, trained=True)
        value_model = load_model("value", folders["value"], tokenizer, options, trained=False)

        def logprobs_of(mb):
            return policy.response_logprobs(**mb)[0]

        def values_of(mb):
            return response_values(value_model, **mb)

        logprobs = run_micro_batches(logprobs_of, sequences, 2, pad, width, torch.float64)
        values = run_micro_batches(values_of, sequences, 2, pad, width + 1, torch.float64)
        norm = one_update(policy, adamw(policy, 1e-5), sequences, 2, pad, lr=1e-5)
        after = run_micro_batches(logprobs_of, sequences, 2, pad, width, torch.float64)
    return {
        "mask": response_mask([response for _, response in sequences], "cpu"),
        "logprobs": logprobs.cpu(),
        "values": values[:, 1:].cpu(),  # after each token, as many as there are log-probabilities
        "logprobs after": after.cpu(),
        "norm": norm,
    }


# --- update -------------------------------------------------------------------------------------------------


def update(record: Record) -> None:
    """Forward, backward and AdamW of a policy, without sampling."""
    names = [record.options.model] if record.options.model else ["1B", "3B"]
    for name in names:
        folder = policy_folder(record, name)
        for checkpointing in (True, False):  # what needs the least memory first
            work = functools.partial(time_updates, record, name, folder, checkpointing)
            with contextlib.suppress(torch.OutOfMemoryError):  # the row says so
                in_group(work)


def time_updates(record: Record, name: str, folder: str, checkpointing: bool) -> None:
    """Rows for micro-batches that grow; one that does not fit ends it."""
    tokenizer = load_tokenizer(folder)
    options = model_options("auto", checkpointing)
    policy = load_model("policy", folder, tokenizer, options, trained=True)
    optimizer = adamw(policy, 1e-6)
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    batch = 4 if record.dry else 16
    prompt, response = (8, 24) if record.dry else (256, 768)
    sequences = random_sequences(policy.config.vocab_size, [(prompt, response)] * batch)
    tokens = batch * (prompt + response)
    for micro in (2, 4) if record.dry else (2, 8):
        row = {
            "model": name,
            "parameters": parameters,
            "checkpointing": checkpointing,
            "micro-batch": micro,
            "tokens": tokens,
        }
        step = functools.partial(
            one_update, policy, optimizer, sequences, micro, tokenizer.pad_token_id, 1e-6
        )
        try:
            step()  # makes the moments, and warms up
            meter.peak_memory_gb(restart=True)
            seconds = statistics.median(timed(step) for _ in range(2 if record.dry else 4))
        except torch.OutOfMemoryError:
            record.row("update", row | {"error": "out of memory"})
            raise
        row["s"] = seconds
        row["tokens/s"] = tokens / seconds
        row["model TFLOP/s"] = 6 * parameters * tokens / seconds / 1e12
        row["MFU"] = meter.mfu(policy, tokens, seconds).get("perf/mfu")
        row["state GB"] = meter.state_bytes([policy], [optimizer]) / GB
        row["peak GB"] = meter.peak_memory_gb()
        record.row("update", row)


# --- decode -------------------------------------------------------------------------------------------------


def decode(record: Record) -> None:
    """Sampling, by our own loop and by vLLM, against the time to read weights and cache once per token."""
    folder = policy_folder(record, record.options.model or "1B")
    in_group(functools.partial(time_decoding, record, folder))


def copy_bandwidth(size: int) -> float:
    """Bytes/s that the device's memory moves when it copies `size` bytes: each is read and written."""
    source = torch.ones(size, dtype=torch.uint8, device=device())
    to = torch.empty_like(source)
    to.copy_(source)
    seconds = statistics.median(timed(functools.partial(to.copy_, source)) for _ in range(10))
    return 2 * size / seconds


def bytes_per_step(policy, batch: int, context: float) -> float:
    """Bytes that a token for each of `batch` responses must read: the weights once, keys and values of each
    response's `context` tokens. An input embedding that is no output layer is looked up, not read."""
    config = policy.config
    itemsize = policy.compute_dtype.itemsize
    weights = sum(parameter.numel() for parameter in policy.parameters())
    if not config.tie_word_embeddings:
        weights -= policy.get_input_embeddings().weight.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim  # numbers per token
    return itemsize * (weights + batch * context * cache)


def time_decoding(record: Record, folder: str) -> None:
    """A row per engine and batch."""
    tokenizer = load_tokenizer(folder)
    policy = load_model("policy", folder, tokenizer, model_options("auto"), trained=True)
    bandwidth = copy_bandwidth(2**24 if record.dry else 2**31)
    record.row("memory", {"copy GB/s": bandwidth / 1e9})
    batches = (1, 4) if record.dry else (1, 8, 64, 256)
    prompt, tokens = (8, 6) if record.dry else (256, 128)
    time_engine(record, policy, "torch", batches, prompt, tokens, bandwidth)
    if not find_spec("vllm"):
        record.row("vllm", {"vllm": "not installed"})
        return
    free()
    cache_bytes = bytes_per_step(policy, max(batches), prompt + tokens) - bytes_per_step(policy, 0, 0)
    args = SimpleNamespace(
        precision="auto",
        seed=0,
        max_prompt_length=prompt,
        max_response_length=tokens,
        rollout_batch_size=max(batches),
        vllm_cache_gb=1.2 * cache_bytes / GB + 0.5,
    )
    try:
        policy.engine = vllm.Engine(policy, folder, args)
        time_engine(record, policy, "vllm", batches, prompt, tokens, bandwidth)
    except (Exception, SystemExit) as error:  # whatever it is, our own loop's rows stay
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        record.row("vllm", {"vllm": reason})


def time_engine(
    record: Record, policy, engine: str, batches: tuple, prompt: int, tokens: int, bandwidth: float
) -> None:
    """The time of one token for all of a batch: that of `tokens` tokens less that of the first, by how many
    come after it. So neither the prompts nor the copy of the weights counts."""
    for batch in batches:
        sequences = random_sequences(policy.config.vocab_size, [(prompt, 1)] * batch)
        prompts = [asked for asked, _ in sequences]

        def sample(limit: int):
            # no token ends a response
            rollout_room.sample_all(policy, prompts, limit, 1.0, (0, 0), 0, [], 0)

        row = {"engine": engine, "batch": batch, "prompt": prompt, "tokens": tokens}
        try:
            sample(tokens)  # warms up
            meter.peak_memory_gb(restart=True)
            first = statistics.median(timed(functools.partial(sample, 1)) for _ in range(3))
            all_of_them = statistics.median(timed(functools.partial(sample, tokens)) for _ in range(2))
        except torch.OutOfMemoryError:
            record.row("decode", row | {"error": "out of memory"})
            return
        seconds = (all_of_them - first) / (tokens - 1)
        bound = bytes_per_step(policy, batch, prompt + tokens / 2) / bandwidth
        row["ms per token"] = 1000 * seconds
        row["tokens/s"] = batch / seconds
        row["bound, tokens/s"] = batch / bound
        row["share of the bound"] = bound / seconds
        row["whole rollout, tokens/s"] = batch * tokens / all_of_them
        row["peak GB"] = meter.peak_memory_gb()
        record.row("decode", row)


# --- steps --------------------------------------------------------------------------------------------------


def steps(record: Record) -> None:
    """Whole steps of the scripts: seconds and memory by phase, and the memory that was planned for them."""
    folder = policy_folder(record, record.options.model or "1B")
    tokenizer = load_tokenizer(folder)
    number = record.options.steps or (2 if record.dry else 4)
    shape = {
        "batch_size": 64,
        "mini_batch_size": 16,
        "micro_batch_size": 4,
        "max_prompt_length": 256,
        "max_response_length": 256,
    }
    if record.dry:
        shape = {
            "batch_size": 8,
            "mini_batch_size": 4,
            "micro_batch_size": 2,
            "max_prompt_length": 12,
            "max_response_length": 8,
            "precision": "fp32",
        }
    prompts = Path(record.options.work, "steps.jsonl")
    # with the script's own flags, which may say otherwise
    asked = [*words_of(shape), *record.flags, "--dataset", str(prompts), "--model", folder]
    args = parse(SCRIPTS[record.options.only[0]].Args, {}, asked)
    write_prompts(prompts, tokenizer, 2 * args.batch_size, args.max_prompt_length)
    models = {
        "grpo": {"reward": value_folder(record, "reward", folder)},
        "ppo": {"reward": value_folder(record, "reward", folder)},
        "dvpo": {"gvm": value_folder(record, "value", folder)},
    }
    rows = {}
    for name in record.options.only:
        run_dir = Path(record.options.work, f"steps-{name}")
        shutil.rmtree(run_dir, ignore_errors=True)
        # what the planner is told too, then what it makes up itself
        planned_flags = words_of({"model": folder, **models[name], **shape}) + record.flags
        own = {"dataset": prompts, "run_dir": run_dir, "steps": number}
        own |= {"eval_every": 0, "eval_prompts": 0, "save_every": 0}
        row = {"script": name}
        try:
            run_script(name, planned_flags + words_of(own), export=False)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        finally:  # a run that the limit cuts off has steps too
            row |= step_summary(steps_of(run_dir))
            record.row("steps", row)
        rows[name] = (row, planned_flags)
    # Afterwards, since planning needs no GPU: whoever lends one for a short time loses the least.
    for row, planned_flags in rows.values():
        plan = plan_memory.measure(row["script"], planned_flags, gpus=1)
        scoring = max(plan.phases["reward"], plan.phases["advantage"])
        row["rollout planned GB"] = plan.phases["rollout"] / GB
        row["scoring planned GB"] = scoring / GB
        row["update planned GB"] = plan.phases["update"] / GB
        record.write()


def step_summary(lines: list[dict]) -> dict[str, float]:
    """Medians over a run's steps but the first, which warms up; the memory of the last, when all is there."""
    if not lines:
        return {"measured steps": 0}
    later = lines[1:] or lines

    def median(name: str) -> float:
        return statistics.median(line[name] for line in later)

    out = {"measured steps": len(later), "s": median("time/step_s")}
    for phase in ("rollout", "scoring", "update"):
        out[f"{phase} s"] = median(f"time/{phase}_s")
    out["rollout tokens/s"] = median("perf/rollout_tokens_per_s")
    out["update tokens/s"] = median("perf/update_tokens_per_s")
    if "perf/mfu" in lines[-1]:
        out["MFU of the update"] = median("perf/mfu")
    out["response length"] = median("rollout/length")
    out["state GB"] = lines[-1]["memory/state_gb"]
    for phase in ("rollout", "scoring", "update"):
        out[f"{phase} GB"] = lines[-1][f"memory/{phase}_gb"]
    return out


# --- learn --------------------------------------------------------------------------------------------------


def learn(record: Record) -> None:
    """Learning curves on a model and data of the user's. The same command goes on where the limit stopped it."""
    names = list(record.options.only)
    if not (record.dry or record.options.gvm) and "dvpo" in names:
        names.remove("dvpo")
        record.note("dvpo is left out: it needs --gvm")
    number = record.options.steps or (2 if record.dry else 200)
    left = len(names)
    for name in names:
        run_dir = Path(record.options.work, f"learn-{name}")
        share = (record.options.limit - record.seconds()) / left
        left -= 1
        try:
            if not finished(run_dir, number):
                words = words_of(learn_flags(record, name, run_dir, number)) + record.flags
                with stopping_at(SCRIPTS[name], time.perf_counter() + share, number):
                    run_script(name, [*words, "--resume"], export=True)
        except Enough:
            record.note(f"{name} stopped at a checkpoint; the same command goes on")
        except torch.OutOfMemoryError:
            record.note(f"{name}: out of memory")
        finally:
            write_curve(record, name, logged(run_dir), number)


def learn_flags(record: Record, name: str, run_dir: Path, number: int) -> dict:
    """A script's command line; its other flags come behind."""
    given = record.options
    flags = {
        "model": given.model,
        "dataset": given.prompts,
        "run_dir": run_dir,
        "steps": number,
        "batch_size": 64,
        "mini_batch_size": 16,
        "micro_batch_size": 8,
        "max_prompt_length": 512,
        "max_response_length": 256,
        "eval_every": EVERY,
        "save_every": 1,  # `stopping_at` chooses among them
        "keep": 1,
    }
    reward = given.reward
    gvm = given.gvm
    if record.dry:
        reward = "assets.reviews:reward"
        gvm = "reviews"
        flags |= {
            "model": "reviews",
            "dataset": "reviews",
            "batch_size": 16,
            "mini_batch_size": 16,
            "max_prompt_length": 16,
            "max_response_length": 16,
            "eval_every": 1,
            "eval_prompts": 8,
        }
    flags["eval_reward"] = reward
    if name == "dvpo":
        flags["gvm"] = gvm
    else:
        flags["reward"] = reward
    return flags


def finished(run_dir: Path, number: int) -> bool:
    """Whether a run has made all its steps and exported its model."""
    found = steps_of(run_dir)
    return bool(found) and found[-1]["step"] >= number and (run_dir / "model").exists()


@contextlib.contextmanager
def stopping_at(script, end: float, number: int):
    """Inside, a script of `number` steps stops before `end` (perf_counter), with a checkpoint of all that it
    has done. It offers one after every step (--save-every 1); few are written, since each is a file of three
    times the model."""
    real = script.save_checkpoint
    before = None  # when the last step ended

    def save_checkpoint(run_dir, done, *more):
        nonlocal before
        here = time.perf_counter()
        took = here - before if before else 0.0  # before the first step lies the loading
        before = here
        is_last = done < number and here + took + SAVING > end
        if is_last or done == number or done % EVERY == 0:
            real(run_dir, done, *more)
        if is_last:
            raise Enough

    with mock.patch.object(script, "save_checkpoint", save_checkpoint):
        yield


def write_curve(record: Record, name: str, lines: list[dict], number: int) -> None:
    """All numbers of a run's log into the JSON; of its steps some ten into the page."""
    groups = ("objective/", "rollout/", "eval/", "policy/", "time/step_s", "step")
    record.curves[name] = [
        {key: value for key, value in line.items() if key.startswith(groups)} for line in lines
    ]
    found = [line for line in lines if "time/step_s" in line]
    evaluations = [line for line in lines if any(key.startswith("eval/") for key in line)]
    row = {"script": name, "steps": len(found), "of": number}
    if found:
        row["s per step"] = statistics.median(line["time/step_s"] for line in found)
    if evaluations:
        for key, value in evaluations[0].items():
            if key.startswith("eval/"):
                row[f"{key}, first"] = value
                row[f"{key}, last"] = evaluations[-1].get(key)
    record.row("learn", row)
    every = max(1, len(found) // 10)
    for line in found[every - 1 :: every]:
        point = {"script": name, "step": line["step"]}
        for key in ("objective/score", "objective/kl", "objective/entropy", "rollout/length"):
            point[key] = line.get(key)
        record.row("curve", point)


# --- the command line ---------------------------------------------------------------------------------------


class Piece(NamedTuple):
    work: Callable[[Record], None]
    minutes: int
    """guessed, for one GPU of 80 GB"""
    line: str


PIECES = {
    "correct": Piece(correct, 4, "bf16 on the GPU against the CPU; sampler against policy; the first ratio"),
    "update": Piece(update, 6, "tokens/s, MFU and memory of the update, 1B and 3B"),
    "decode": Piece(decode, 4, "tokens/s of our rollout, and of vLLM, against the memory's bandwidth"),
    "steps": Piece(steps, 7, "DVPO, PPO and GRPO: seconds per step, and memory by phase beside its plan"),
    "learn": Piece(learn, 8, "learning curves on your model, prompts and reward; the same command goes on"),
}


def table(rows: list[dict]) -> str:
    """A Markdown table; its columns are all that some row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return markdown(columns, [[in_digits(row.get(column)) for column in columns] for row in rows])


def page(out: Path) -> str:
    """All results in a folder as one page."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    found = [one for one in found if one.get("piece") in PIECES]
    if not found:
        fail(f"{out}: no results of benchmarks/gpu.py")
    lines = ["# Measured on one GPU", ""]
    if any(one["dry_run"] for one in found):
        lines += ["**Some of this is from dry runs on a CPU: those numbers mean nothing.**", ""]
    abouts = []
    for one in found:
        keys = (
            "piece",
            "device",
            "torch",
            "transformers",
            "commit",
            "date",
            "seconds",
            "complete",
            "dry_run",
        )
        abouts.append({key: one[key] for key in keys} | {"command": f"`{one['command']}`"})
    lines.append(table(abouts))
    for one in found:
        lines += ["", f"## {one['piece']}", "", PIECES[one["piece"]].line + "."]
        for note in one["notes"]:
            lines += ["", f"Note: {note}."]
        for name, rows in one["tables"].items():
            lines += ["", f"### {one['piece']}: {name}", "", table(rows)]
    return "\n".join(lines) + "\n"


def check(options: Options, flags: list[str], name: str) -> None:
    """Ends with one line where a piece cannot run with these options."""
    if options.limit <= 0 or options.steps < 0:
        fail("--limit must be above 0, and --steps not negative")
    if flags and name not in ("steps", "learn", "all"):
        fail(f"{name} takes no {flags[0]}; only steps and learn pass flags on to the scripts")
    if not options.only:
        fail(f"--only: name some of {', '.join(SCRIPTS)}")
    for script in options.only:
        if script not in SCRIPTS:
            fail(f"--only {script}: no such script; there are {', '.join(SCRIPTS)}")
    if options.dry_run:
        return
    given = options.model
    if given and given not in SIZES and not Path(given, "config.json").is_file():
        fail(f"--model {given}: neither a folder with a config.json nor one of {', '.join(SIZES)}")
    if name != "learn":
        return
    if not given or given in SIZES:
        fail("learn needs --model, the folder of a trained model: random weights learn nothing in minutes")
    if not (options.prompts and options.reward):
        fail("learn needs --prompts, a file with a column `prompt`, and --reward, a module:function")
    if (
        options.prompts.endswith((".jsonl", ".json", ".parquet", ".gz"))
        and not Path(options.prompts).exists()
    ):
        fail(f"--prompts {options.prompts}: no such file")


def run_piece(name: str, options: Options, flags: list[str], words: list[str]) -> None:
    """One piece, to its end or to the limit."""
    record = Record(name, options, flags, words)
    try:
        start_clock(options.limit)
        PIECES[name].work(record)
        stop_clock()
        record.complete = True
    except OutOfTime:
        stop_clock()
        record.note(f"stopped after {record.seconds():.0f} s, by --limit")
    except torch.OutOfMemoryError:
        record.note("out of memory: try a smaller --model")
    finally:
        stop_clock()
        record.write()
    print(f"{name}: {Path(options.out, name)}.json, {record.seconds():.0f} s", flush=True)


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    options, flags = tyro.cli(Options, args=words, return_unknown_args=True)
    name = options.piece
    if name == "list":
        for piece, about in PIECES.items():
            print(f"{piece:8} about {about.minutes} min (a guess): {about.line}")
        return
    if name == "page":
        text = page(Path(options.out))
        Path(options.out, "gpu.md").write_text(text)
        print(text)
        return
    if name not in PIECES and name != "all":
        fail(f"{name}: no such piece; there are {', '.join(PIECES)}, and list and page")
    if name == "all" and not options.dry_run:
        fail("all is for --dry-run: on a GPU run a piece at a time")
    check(options, flags, name)
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for a GPU
    for piece in PIECES if name == "all" else [name]:
        run_piece(piece, options, flags, words)


if __name__ == "__main__":
    main()
