"""One side of one pair of speed.py, in a process of its own: one of our scripts by its own command line, or
TRL's trainer.

    python benchmarks/speed_side.py spec.json

writes spec["out"]: when each step ended, peak memory above imports, the losses, what was generated. Both
sides are watched in the same way, from outside the library: a step lasts from one step's end to the next
one's, so it holds data, rollout, scoring, update and logging; generation is timed around the one function
that does it. This file imports nothing of ours for TRL's side, whose environment may hold nothing but TRL.
"""

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}


def memory_mb(key: str) -> float:
    """VmRSS, what is resident now, or VmHWM, its peak. (ru_maxrss would begin at the peak of the parent
    process.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def reward(prompts, responses=None, completions=None, **_) -> list[float]:
    """A reward that costs nothing and differs within a group: how many different words, of the first
    sixteen."""
    rewards = []
    for text in responses or completions:
        different = len(set(text.split()[:16]))
        rewards.append(float(different) + len(text) % 7)
    return rewards


class Watch:
    """What is measured, the same on both sides."""

    def __init__(self, spec: dict):
        import torch
        import torch.utils.tensorboard
        import transformers

        # not used here, but loaded by both sides: their memory must count among the imports
        from transformers import (  # noqa: F401 (see above)
            AutoTokenizer,
            LlamaForCausalLM,
            LlamaForSequenceClassification,
        )

        self.torch = torch
        self.cuda = torch.cuda.is_available()
        self.spec = spec
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.steps = []
        self.rollouts = []
        self.base = 0.0  # MB that the imports take
        self.before = 0.0  # MB: the peak before a script restarted the count
        self.peak = 0.0  # MB

    def imported(self) -> None:
        """All imports are done: what comes is the work's memory."""
        gc.collect()
        self.base = memory_mb("VmRSS")

    def now(self) -> float:
        """Seconds, when the GPU has done what it was told to."""
        if self.cuda:
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def step_end(self, **values) -> None:
        """The peak is that of the steps: loading counts, exporting after the last step does not."""
        self.steps.append({"at": self.now(), "cpu": time.process_time(), **values})
        if self.cuda:
            self.peak = max(self.before, self.torch.cuda.max_memory_allocated() / 2**20)
        else:
            self.peak = max(self.before, memory_mb("VmHWM")) - self.base

    def time_rollout(self, function: Callable, lengths: Callable) -> Callable:
        """`function` timed; `lengths(its result, its arguments)` are the tokens of each response."""

        def timed(*args, **kwargs):
            start = self.now()
            out = function(*args, **kwargs)
            seconds = self.now() - start
            ended = self.now()
            found = lengths(out, *args, **kwargs)
            self.rollouts.append({"at": ended, "seconds": seconds, "lengths": found})
            return out

        return timed

    def save(self, **more) -> None:
        """Writes the record of this side."""
        record = {
            "steps": self.steps,
            "rollouts": self.rollouts,
            "peak_mb": self.peak,
            "import_mb": self.base,
            "versions": self.versions,
            **more,
        }
        Path(self.spec["out"]).write_text(json.dumps(record))


# --- our side -----------------------------------------------------------------------------------------------


def ours(spec: dict) -> None:
    """The script as it is, with the arguments of its command line. Two things are changed: each line of
    metrics is noted with its time, and the export after the last step is left out (TRL's trainers do not save
    here either)."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    watch = Watch(spec)
    script = importlib.import_module(spec["script"])
    from common import distributed, meter
    from common.cli import parse
    from common.log import Run

    watch.imported()
    real_metrics = Run.metrics
    real_peak = meter.peak_memory_gb

    def noted_peak(restart=False):
        """The RL scripts restart the count at each phase; the peak of all of them is wanted."""
        peak = real_peak(restart)
        watch.before = max(watch.before, 1024 * peak)
        return peak

    def noted_metrics(run, step, values, show=()):
        real_metrics(run, step, values, show)
        if "time/step_s" in values:
            watch.step_end(metrics={key: float(value) for key, value in values.items()})

    def no_export(*_, **__):
        pass

    def lengths(out, *_, **__):
        responses, _ = out
        return [len(response) for response in responses]

    meter.peak_memory_gb = noted_peak
    Run.metrics = noted_metrics
    script.export = no_export
    if hasattr(script, "rollout"):
        script.rollout = watch.time_rollout(script.rollout, lengths)
    sys.argv = [spec["script"] + ".py", *spec["arguments"]]
    distributed.launch(script.main, parse(script.Args, script.REVIEWS))
    watch.save()


# --- TRL's side ---------------------------------------------------------------------------------------------
#
# What is not TRL's default here, each to match our work or our log: no gradient checkpointing (TRL's default
# is on: less memory,
# a third more time), a constant rate without weight decay, the data in the order our scripts draw them, a
# line of log a step to
# TensorBoard, no checkpoints, float32 weights with bf16 compute on a GPU; reference log-probabilities of DPO
# and KTO before the
# first step, as ours are, and the reference then freed by hand; GRPO's loss as in the paper. Left at TRL's
# defaults, and good for
# it: fused AdamW, the output layer fused with the loss, GRPO's old log-probabilities not computed where there
# is one
# update a rollout. Not used: vLLM and Liger, which replace the generator or the kernels of either side and
# need a GPU; PPO has no
# gradient clipping in TRL, and one optimizer step an epoch whatever `num_mini_batches` says.


def common_arguments(spec: dict, cuda: bool) -> dict:
    """Of every trainer."""
    size = spec["size"]
    return {
        "output_dir": spec["run_dir"],
        "per_device_train_batch_size": size["micro"],
        "gradient_accumulation_steps": size["batch"] // size["micro"],
        "max_steps": spec["steps"],
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "report_to": "tensorboard",
        "save_strategy": "no",
        "bf16": cuda,
        "use_cpu": not cuda,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 0,
    }


def trl_classes(algorithm: str):
    """TRL's trainer and its arguments."""
    import trl

    if algorithm == "ppo":
        from trl.experimental import ppo

        return ppo.PPOTrainer, ppo.PPOConfig
    name = {"sft": "SFT", "reward": "Reward"}.get(algorithm, algorithm.upper())
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


def theirs(spec: dict) -> None:
    """TRL's trainer on the same rows in the same order."""
    watch = Watch(spec)
    import transformers
    import trl

    # some of it is used below only, but must count among the imports
    from datasets import Dataset, disable_progress_bars  # noqa: F401 (see above)
    from transformers import (  # noqa: F401 (see above)
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from transformers.generation import GenerationMixin

    algorithm = spec["algorithm"]
    trainer_class, config_class = trl_classes(algorithm)
    watch.imported()
    disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()

    logged = {}  # by metric, one per step
    first = {}  # what the first rollout was

    class Callback(TrainerCallback):
        def on_step_end(self, *_, **__):
            watch.step_end()

        def on_log(self, args, state, control, logs=None, **__):
            logs = logs or {}
            for key in ("loss", "loss/policy_avg", "objective/kl", "objective/scores"):
                if key in logs:
                    logged.setdefault(key, []).append(logs[key])

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    eos = tokenizer.eos_token_id

    def lengths(out, *_, **kwargs):
        """Tokens of each response up to its eos."""
        tokens = out.sequences if hasattr(out, "sequences") else out  # [B, prompt + T]
        prompts = kwargs.get("input_ids", kwargs.get("inputs"))
        responses = tokens[:, prompts.shape[1] :].tolist()
        return [len(up_to(response, eos)) for response in responses]

    if algorithm in ("grpo", "ppo"):
        GenerationMixin.generate = watch.time_rollout(GenerationMixin.generate, lengths)

    rows = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]
    arguments = common_arguments(spec, watch.cuda)
    parts = {"processing_class": tokenizer, "callbacks": [Callback()]}
    if algorithm == "grpo":
        trainer = grpo_trainer(spec, trainer_class, config_class, arguments, rows, parts, first)
    elif algorithm == "ppo":
        trainer = ppo_trainer(spec, trainer_class, config_class, arguments, rows, parts, first)
    else:
        trainer = offline_trainer(spec, trainer_class, config_class, arguments, rows, parts)
    trainer.train()
    watch.save(logged=logged, first=first, trl=trl.__version__)


def up_to(tokens: list[int], eos: int) -> list[int]:
    """A response with its eos and nothing after it."""
    if eos in tokens:
        return tokens[: tokens.index(eos) + 1]
    return tokens


def load_policy(path: str):
    """float32 weights, as ours are."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def load_scorer(path: str):
    """A reward model, or a critic that starts as one."""
    import torch
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, num_labels=1)


def grpo_trainer(spec, trainer_class, config_class, arguments: dict, rows: list[dict], parts: dict, first):
    """GRPO, with the first rollout noted in `first`."""
    from datasets import Dataset

    size = spec["size"]
    last_rewards = []

    def noted_reward(prompts, completions, **_):
        last_rewards[:] = reward(prompts, completions=completions)
        return last_rewards

    config = config_class(
        **arguments,
        num_generations=size["group"],
        beta=spec["beta"],
        max_completion_length=size["response"],
        num_iterations=1,
        temperature=1.0,
        loss_type="grpo",
        shuffle_dataset=False,
        model_init_kwargs={"dtype": "float32"},
        use_bias_correction_kl=False,
    )
    dataset = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    trainer = trainer_class(spec["model"], noted_reward, args=config, train_dataset=dataset, **parts)
    # it knows no reference but the model itself
    trainer.ref_model.load_state_dict(load_policy(spec["ref_model"]).state_dict())
    generate_and_score = trainer._generate_and_score_completions

    def noted_generate_and_score(inputs):
        out = generate_and_score(inputs)
        if not first:
            first["prompt"] = without_padding(out["prompt_ids"], out["prompt_mask"])
            first["completion"] = without_padding(out["completion_ids"], out["completion_mask"])
            first["rewards"] = list(last_rewards)
        return out

    trainer._generate_and_score_completions = noted_generate_and_score
    return trainer


def without_padding(ids, masks) -> list[list[int]]:
    """Tokens [B, T] where a mask [B, T] has them."""
    out = []
    for tokens, mask in zip(ids.tolist(), masks.tolist(), strict=True):
        out.append([token for token, kept in zip(tokens, mask, strict=True) if kept])
    return out


def ppo_trainer(spec, trainer_class, config_class, arguments: dict, rows: list[dict], parts: dict, first):
    """PPO, with the first rollout and the critic's first loss noted in `first`."""
    import torch
    from datasets import Dataset
    from trl.experimental.ppo import ppo_trainer as library

    size = spec["size"]
    tokenizer = parts["processing_class"]
    config = config_class(
        **arguments,
        num_mini_batches=1,
        num_ppo_epochs=size["epochs"],
        total_episodes=size["batch"] * spec["steps"],
        response_length=size["response"],
        stop_token="eos",
        temperature=1.0,
        kl_coef=spec["beta"],
        num_sample_generations=0,
        local_rollout_forward_batch_size=size["batch"],
    )
    tokenizer.padding_side = "left"
    dataset = Dataset.from_list([{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows])
    trainer = trainer_class(
        config,
        train_dataset=dataset,
        model=load_policy(spec["model"]),
        ref_model=load_policy(spec["ref_model"]),
        reward_model=load_scorer(spec["reward_model"]),
        value_model=load_scorer(spec["reward_model"]),
        **parts,
    )
    # it always shuffles; our order, so that each step has the same prompts
    loader = torch.utils.data.DataLoader(
        dataset, shuffle=False, batch_size=size["batch"], collate_fn=trainer.data_collator, drop_last=True
    )
    trainer.dataloader = trainer.accelerator.prepare(loader)
    generate = library.batch_generation
    whiten = library.masked_whiten

    def noted_generation(model, queries, *more):
        found = generate(model, queries, *more)
        if "prompt" not in first:
            first["prompt"] = []
            for query in queries.tolist():
                first["prompt"].append([token for token in query if token != tokenizer.pad_token_id])
            responses = found[0][:, queries.shape[1] :].tolist()
            first["completion"] = [up_to(response, tokenizer.eos_token_id) for response in responses]
        return found

    def noted_whiten(values, mask, **more):
        """Before the first update the critic's loss is half the mean squared advantage."""
        if "value_loss" not in first:
            first["value_loss"] = 0.5 * (values[mask] ** 2).mean().item()
        return whiten(values, mask, **more)

    library.batch_generation = noted_generation
    library.masked_whiten = noted_whiten
    return trainer


def offline_trainer(spec, trainer_class, config_class, arguments: dict, rows: list[dict], parts: dict):
    """SFT, a reward model, DPO or KTO."""
    from datasets import Dataset

    algorithm = spec["algorithm"]
    more_arguments = {}
    more_parts = {}
    if algorithm == "reward":
        model = load_scorer(spec["reward_model"])
    else:
        model = load_policy(spec["model"])
    if algorithm in ("dpo", "kto"):
        more_arguments = {"beta": spec["beta"], "precompute_ref_log_probs": True}
        more_parts["ref_model"] = load_policy(spec["ref_model"])
    config = config_class(
        **arguments, train_sampling_strategy="sequential", max_length=None, **more_arguments
    )
    dataset = Dataset.from_list([their_row(row, algorithm) for row in rows])
    trainer = trainer_class(model=model, args=config, train_dataset=dataset, **parts, **more_parts)
    if "ref_model" in more_parts:  # with the data scored it is not needed; ours is freed too
        trainer.ref_model = None
        more_parts.clear()
        gc.collect()
    return trainer


def their_row(row: dict, algorithm: str) -> dict:
    """A row under TRL's names. The prompt is followed by a space, which to this tokenizer is nothing: words
    stay words."""
    out = {"prompt": row["prompt"]}
    if algorithm in ("sft", "kto"):
        out["completion"] = " " + row["response"]
    else:
        out["chosen"] = " " + row["chosen"]
        out["rejected"] = " " + row["rejected"]
    if algorithm == "kto":
        out["label"] = row["label"]
    return out


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec["side"] == "trl":
        theirs(spec)
    else:
        ours(spec)
