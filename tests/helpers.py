"""Helpers of the tests that run whole scripts: cheap rank processes, a small world to run in, faults to inject.

Processes are forked from one clean server that has imported everything, so that a rank starts in a fraction of a second.
What a child needs patched is a function here (picklable), called with the script's module before `main`.
"""

import contextlib
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = ("sft", "reward", "gvm_td", "dvpo", "ppo", "rpo", "dro", "kto", "dpo", "grpo", "remax")
ONLINE = ("dvpo", "ppo", "grpo", "remax")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *SCRIPTS,
        "evaluate",
        "pytest",
        "helpers",
        "transformers.models.llama.modeling_llama",
        "torch.utils.tensorboard",
    ]
    + ["matplotlib.pyplot"]
)
ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# at random: two suites at once
PORTS = itertools.cycle(random.SystemRandom().sample(range(20_000 + WORKER, 32_000, 64), 187))
if sys.argv[0] == "-c":  # in the server: a table that every process would compile for its first load
    with contextlib.suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")

# Three small steps on ragged files; online scripts: 9 responses a step, mini-batches of 3, so 4 ranks leave one with nothing.
SMALL = dict(
    part="all",
    steps=3,
    micro_batch_size=8,
    max_prompt_length=24,
    max_response_length=16,
    warmup_steps=0,
    eval_every=0,
    save_every=0,
    lr=1e-3,
)
OFFLINE_ARGS = dict(batch_size=7, eval_fraction=0.3)
ONLINE_ARGS = dict(
    dataset="prompts.jsonl",
    batch_size=9,
    mini_batch_size=3,
    epochs=1,
    eval_prompts=5,
    eval_every=3,
    eval_reward=(),
)
ARGS = {
    "sft": SMALL | OFFLINE_ARGS | dict(dataset="scored.jsonl", eval_prompts=3, eval_reward=()),
    "reward": SMALL | OFFLINE_ARGS | dict(dataset="pairs.jsonl"),
    "gvm_td": SMALL | OFFLINE_ARGS | dict(dataset="scored.jsonl", eval_source=""),
    "dvpo": SMALL | ONLINE_ARGS,
    "rpo": SMALL | OFFLINE_ARGS | dict(dataset="scored.jsonl", eval_prompts=3, eval_reward=()),
    "dro": SMALL | OFFLINE_ARGS | dict(dataset="scored.jsonl", eval_prompts=3, eval_reward=()),
    "kto": SMALL
    | OFFLINE_ARGS
    | dict(dataset="labels.jsonl", threshold=None, eval_prompts=3, eval_reward=()),
    "dpo": SMALL | OFFLINE_ARGS | dict(dataset="pairs.jsonl", eval_prompts=3, eval_reward=()),
    "grpo": SMALL | ONLINE_ARGS | dict(group_size=3, reward="helpers:length_reward"),
    "remax": SMALL | ONLINE_ARGS | dict(reward="helpers:length_reward"),
    "ppo": SMALL | ONLINE_ARGS | dict(critic_lr=1e-3, reward="helpers:length_reward"),
}


def length_reward(prompts, responses, **_):
    """A reward function for --reward: the shorter the better, and something for the soup."""
    return [("soup" in text) - 0.1 * len(text.split()) for text in responses]


def nan_reward(prompts, responses, **_):
    return [float("nan")] * len(responses)


def raising_reward(prompts, responses, **_):
    raise ValueError("no such judge")


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    codes: list[int]
    output: str  # of all ranks

    def ok(self):
        assert not any(self.codes), f"exit codes {self.codes}\n{self.output}"
        return self

    def error(self) -> str:
        """The one-line error a run stopped with; fails where there was none, or a traceback."""
        lines = [line for line in self.output.splitlines() if line.startswith("error: ")]
        assert 1 in self.codes and all(self.codes), (self.codes, self.output)
        assert len(lines) == 1 and "Traceback" not in self.output, self.output
        assert self.output.rstrip().endswith(lines[0]), self.output  # nothing after it: it is one line
        return lines[0]


def free_port() -> int:
    """One that nobody listens on, below those the system hands out: with those, gloo of another worker could take it before the
    first rank does. Workers of pytest-xdist take theirs from series that do not meet."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


class Job:
    """`call()` in `ranks` processes that see torchrun's variables (0: one process without them), `cwd` their folder."""

    def __init__(self, cwd, call, ranks):
        port = free_port() if ranks else 0
        self.log = Path(cwd, f"log-{time.monotonic_ns()}")
        self.processes = [
            CONTEXT.Process(target=_child, args=(str(cwd), call, rank, ranks, port, f"{self.log}-{rank}"))
            for rank in range(max(1, ranks))
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout=TIMEOUT) -> Result:
        """Waits for all; what is left after `timeout` seconds is killed and fails the test. As under torchrun, the end of one
        that failed is the end of all."""
        end = time.monotonic() + timeout
        while time.monotonic() < end and not all(process.exitcode == 0 for process in self.processes):
            running = [process.sentinel for process in self.processes if process.exitcode is None]
            if running:  # of none it would wait for the whole time
                multiprocessing.connection.wait(running, end - time.monotonic())
            if any(process.exitcode for process in self.processes):
                time.sleep(0.1)  # torchrun looks that often
                [process.terminate() for process in self.processes]
                break
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process in self.processes if process.exitcode is None]
        self.kill()
        output = "".join(path.read_text() for path in sorted(self.log.parent.glob(f"{self.log.name}-*")))
        assert not late, f"{len(late)} processes hung for {timeout} s\n{output}"
        return Result([process.exitcode for process in self.processes], output)

    def alive(self, seconds: float) -> bool:
        """Whether the first process still runs after at most so many seconds."""
        self.processes[0].join(seconds)
        return self.processes[0].exitcode is None

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _child(cwd, call, rank, ranks, port, log):
    os.chdir(cwd)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115 (for good)
    if ranks:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} | address
    call()


def _launch(script, args, patch):
    from common import cli, distributed

    module = importlib.import_module(script)
    if patch:
        patch(module)
    args = module.Args(**{**module.REVIEWS, **args})
    cli.check(args)  # as `parse` does
    distributed.launch(module.main, args)


def _command(script, argv, processes):
    path = str(ROOT / f"{script}.py")
    if processes:
        sys.argv = ["torchrun", "--standalone", f"--nproc_per_node={processes}", path, *argv]
        runpy.run_module("torch.distributed.run", run_name="__main__")
    else:
        sys.argv = [path, *argv]
        runpy.run_path(path, run_name="__main__")


class World:
    """The folder everything runs in."""

    def __init__(self, folder):
        self.folder = folder

    def start(self, script, ranks=0, patch=None, **args) -> Job:
        """The script's `main` with REVIEWS, and `args` on top."""
        return Job(
            self.folder,
            functools.partial(_launch, script, {"run_dir": f"runs/{script}", **args}, patch),
            ranks,
        )

    def run(self, script, ranks=0, patch=None, **args) -> Result:
        return self.start(script, ranks, patch, **args).wait()

    def command(self, script, *argv, processes=0) -> Result:
        """`python script.py argv...` in a process that has the imports already, or under torchrun, whose workers do not."""
        return Job(self.folder, functools.partial(_command, script, argv, processes), 0).wait()

    def path(self, run_dir) -> Path:
        return Path(self.folder, run_dir)

    def write(self, name, rows) -> str:
        """A .jsonl file; rows that are strings are written as they are."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        self.path(name).write_text("".join(line + "\n" for line in lines))
        return name


# --- what a run left -------------------------------------------------------------------------------------------------


def metrics(run_dir) -> list[dict]:
    """The rows of metrics.jsonl without what depends on the machine."""
    rows = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/", "memory/"))} for row in rows]


def samples(run_dir) -> list[dict]:
    return [
        json.loads(line)
        for line in Path(run_dir, "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    ]


def exported(run_dir) -> dict[str, bytes]:
    """The bytes of every exported weight file."""
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in sorted(Path(run_dir).glob("*/*.safetensors"))
    }


def assert_same(run_a, run_b, weights=1e-10, numbers=1e-6, norms=1e-9):
    """The same metrics, samples and exported weights of two runs in float64 (relative differences; below 1 absolute).

    Logged losses are looser than gradient norms: they are summed in float32.
    """
    from safetensors.torch import load_file

    a, b = metrics(run_a), metrics(run_b)
    assert a and [list(row) for row in a] == [list(row) for row in b]
    for row_a, row_b in zip(a, b, strict=True):
        for key, value in row_a.items():
            near = norms if key.endswith("grad_norm") else numbers
            assert math.isclose(value, row_b[key], rel_tol=near, abs_tol=near), (
                key,
                row_a["step"],
                value,
                row_b[key],
            )
    texts = [
        [row.get("response") for row in samples(run)]
        for run in (run_a, run_b)
        if Path(run, "samples.jsonl").exists()
    ]
    assert not texts or texts[0] == texts[1]
    files = [sorted(Path(run).glob("*/*.safetensors")) for run in (run_a, run_b)]
    assert files[0] and [f.parent.name for f in files[0]] == [f.parent.name for f in files[1]]
    for file_a, file_b in zip(*files, strict=True):
        weights_a, weights_b = load_file(file_a), load_file(file_b)
        assert weights_a.keys() == weights_b.keys()
        off = {k: (weights_a[k] - weights_b[k]).abs() / weights_a[k].abs().clamp(min=1) for k in weights_a}
        worst = max((off[k].max().item(), k) for k in off)
        assert worst[0] <= weights, (file_a, worst)


# --- faults and watches: patches of a child ---------------------------------------------------------------------------


def replace_load_model(module, load_model):
    """In the script and in every room that has the function by its own name."""
    from common import models, reference, rewards

    for holder in (module, models, reference, rewards):
        holder.load_model = load_model


def no_models(module):
    """What can be checked without a model must be: loading one fails."""

    def load_model(*_, **__):
        raise AssertionError("a model was loaded")

    replace_load_model(module, load_model)


def watch_frozen(module, log):
    """At export, writes what became of the frozen models: weights that changed, gradients, parameters an optimizer holds."""
    from common import distributed, models, sharding

    load_model, adamw, export, frozen, optimized = models.load_model, module.adamw, module.export, [], set()

    def local(model):
        sharding.reshard(model)
        return {name: p.to_local() for name, p in model.named_parameters()}

    def watched_load(kind, *args, trained, **kwargs):
        model = load_model(kind, *args, trained=trained, **kwargs)
        if not trained:
            frozen.append((kind, model, {name: p.clone() for name, p in local(model).items()}))
        return model

    def watched_adamw(model, *args, **kwargs):
        optimizer = adamw(model, *args, **kwargs)
        optimized.update(id(p) for group in optimizer.param_groups for p in group["params"])
        return optimizer

    def watched_export(*args, **kwargs):
        found = {"kinds": [kind for kind, _, _ in frozen], "changed": [], "gradients": [], "optimized": []}
        for kind, model, before in frozen:
            after = local(model)
            found["changed"] += [f"{kind} {name}" for name in before if not before[name].equal(after[name])]
            for name, p in model.named_parameters():
                found["gradients"] += [f"{kind} {name}"] * (p.grad is not None or p.requires_grad)
                found["optimized"] += [f"{kind} {name}"] * (id(p) in optimized)
        Path(f"{log}-{distributed.rank()}").write_text(json.dumps(found))
        export(*args, **kwargs)

    replace_load_model(module, watched_load)
    module.adamw, module.export = watched_adamw, watched_export


def die_in_second_save(module, when):
    """SIGKILL in the second checkpoint: `half` written, or whole but before the `rename`."""
    from common import checkpoints

    save, rename, count = checkpoints.dcp.save, Path.rename, []

    def dying_save(states, *, checkpoint_id):
        count.append(1)
        save(states, checkpoint_id=checkpoint_id)
        if when == "half" and len(count) == 2:
            (checkpoint_id / ".metadata").unlink()
            for file in checkpoint_id.glob("*.distcp"):
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_rename(path, target):
        if when == "rename" and len(count) == 2 and Path(target).name.startswith("step-"):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    checkpoints.dcp.save, Path.rename = dying_save, dying_rename


def not_finite(module, what, at):
    """The `at`-th (0-based) optimizer step gets a loss of inf, or a gradient with a NaN."""

    optimizer_step, count = module.optimizer_step, []

    def bad_step(model, optimizer, lr, loss, *rest):
        count.append(1)
        if len(count) == at + 1 and what == "loss":
            loss = loss * float("inf")
        elif len(count) == at + 1:
            grad = next(p for p in model.parameters() if p.grad is not None).grad
            (grad.to_local() if hasattr(grad, "to_local") else grad).view(-1)[0] = float("nan")
        return optimizer_step(model, optimizer, lr, loss, *rest)

    module.optimizer_step = bad_step


# --- the world -------------------------------------------------------------------------------------------------------


def make_world(folder):
    """Ragged data, 24 prompts of 4 to 16 words, and a GVM that reads context pairs."""
    from assets import reviews

    world, rng, renamed = World(folder), random.Random(0), {}
    for prompt in reviews.prompts()[:24]:
        occasion, topics = prompt.removesuffix(" ?").split(" : ")
        extra = rng.sample(reviews.TOPICS, rng.randrange(4))
        topics = " and ".join([topics.split(" and ")[0], *(f"the {topic}" for topic in extra)])
        renamed[prompt] = f"{occasion} : {topics} ?"
    for kind, name in (("scored", "scored"), ("preference", "pairs"), ("prompts", "prompts")):
        rows = [row for row in reviews.rows(kind, responses=4) if row["prompt"] in renamed]
        world.write(f"{name}.jsonl", [row | {"prompt": renamed[row["prompt"]]} for row in rows])
        if kind == "scored":
            labelled = [row | {"prompt": renamed[row["prompt"]], "label": row["reward"] > 0} for row in rows]
            world.write("labels.jsonl", labelled)
    edit_model(world, "value", "context", config=lambda old: old | dict(context_pairs=2, context_length=8))
    signs = dict(return_mean=0.0, return_std=1.0)  # as gvm_td.py writes it for returns of +1 and -1
    edit_model(world, "value", "signs", config=lambda old: old | signs)
    edit_model(world, "value", "signs-discounted", config=lambda old: old | signs | dict(gamma=0.9))
    context = dict(context_pairs=2, context_length=8)
    edit_model(world, "value", "signs-context", config=lambda old: old | signs | context)


def edit_model(world, source, name, **files) -> str:
    """runs/<name>: the embedded model `source` with other files (`files`: stem of the .json file -> function of its content)."""
    from assets import reviews

    folder = world.path(f"runs/{name}")
    shutil.copytree(reviews.folder(source), folder)
    for stem, edit in files.items():
        path = folder / f"{stem}.json"
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    return f"runs/{name}"


def make_t5(folder, tied=False, **config):
    """A random T5 with weights large enough that no distribution is uniform, and a unigram tokenizer trained on the reviews,
    whose inputs end with </s> as T5's do."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    from assets import reviews

    texts = [row[key] for row in reviews.rows("sft", responses=1)[:400] for key in ("prompt", "response")]
    words = Tokenizer(models.Unigram())
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = dict(special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    words.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=200, **special))
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    shape = dict(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    config = shape | dict(tie_word_embeddings=tied, decoder_start_token_id=0, dropout_rate=0.3) | config
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **config))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3 if tied else 4)
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return str(folder)
