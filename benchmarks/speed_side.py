"""One side of one pair of speed.py, in a process of its own: one of our scripts by its own command line, or TRL's trainer.

    python benchmarks/speed_side.py spec.json

writes spec["out"]: when each step ended, peak memory above imports, the losses, what was generated. Both sides are watched in the
same way, from outside the library: a step lasts from one step's end to the next one's, so it holds data, rollout, scoring,
update and logging; generation is timed around the one function that does it. This file imports nothing of ours for TRL's
side, whose environment may hold nothing but TRL.
"""

import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path

from common import distributed, meter
from common.cli import parse
from common.log import Run

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}


def memory_mb(key: str) -> float:
    """VmRSS, what is resident now, or VmHWM, its peak. (ru_maxrss would begin at the peak of the parent process.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def reward(prompts, responses=None, completions=None, **_):
    """A reward that costs nothing and differs within a group: how many different words, of the first sixteen."""
    return [float(len(set(text.split()[:16]))) + len(text) % 7 for text in responses or completions]


class Watch:
    """What is measured, the same on both sides."""

    def __init__(self, spec):
        import torch
        import torch.utils.tensorboard
        import transformers
        from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

        self.torch, self.cuda, self.spec = torch, torch.cuda.is_available(), spec
        self.versions = dict(torch=torch.__version__, transformers=transformers.__version__)
        self.steps, self.rollouts, self.peak, self.before = [], [], 0.0, 0.0

    def imported(self):
        gc.collect()
        self.base = memory_mb("VmRSS")

    def now(self):
        if self.cuda:
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def step_end(self, **values):
        """The peak is that of the steps: loading counts, exporting after the last step does not."""
        self.steps.append(dict(at=self.now(), cpu=time.process_time(), **values))
        if self.cuda:
            self.peak = max(self.before, self.torch.cuda.max_memory_allocated() / 2**20)
        else:
            self.peak = max(self.before, memory_mb("VmHWM")) - self.base

    def time_rollout(self, function, lengths):
        """`function` timed; `lengths(its result, its arguments)` are the tokens of each response."""

        def timed(*args, **kwargs):
            start = self.now()
            out = function(*args, **kwargs)
            seconds = self.now() - start
            self.rollouts.append(dict(at=self.now(), seconds=seconds, lengths=lengths(out, *args, **kwargs)))
            return out

        return timed

    def save(self, **more):
        record = dict(
            steps=self.steps,
            rollouts=self.rollouts,
            peak_mb=self.peak,
            import_mb=self.base,
            versions=self.versions,
        )
        record |= more
        Path(self.spec["out"]).write_text(json.dumps(record))


def ours(spec):
    """The script as it is, with the arguments of its command line. Two things are changed: each line of metrics is noted with its
    time, and the export after the last step is left out (TRL's trainers do not save here either)."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    watch, module = Watch(spec), importlib.import_module(spec["script"])

    watch.imported()
    metrics, peak_memory_gb = Run.metrics, meter.peak_memory_gb

    def noted_peak(restart=False):  # the RL scripts restart the count at each phase
        peak = peak_memory_gb(restart)
        watch.before = max(watch.before, 1024 * peak)
        return peak

    meter.peak_memory_gb = noted_peak

    def noted(self, step, values, show=()):
        metrics(self, step, values, show)
        if "time/step_s" in values:
            watch.step_end(metrics={key: float(value) for key, value in values.items()})

    Run.metrics, module.export = noted, lambda *_, **__: None
    if hasattr(module, "rollout"):
        module.rollout = watch.time_rollout(module.rollout, lambda out, *_, **__: [len(r) for r in out[0]])
    sys.argv = [spec["script"] + ".py", *spec["arguments"]]
    distributed.launch(module.main, parse(module.Args, module.REVIEWS))
    watch.save()


# What is not TRL's default here, each to match our work or our log: no gradient checkpointing (TRL's default is on: less memory,
# a third more time), a constant rate without weight decay, the data in the order our scripts draw them, a line of log a step to
# TensorBoard, no checkpoints, float32 weights with bf16 compute on a GPU; reference log-probabilities of DPO and KTO before the
# first step, as ours are, and the reference then freed by hand; GRPO's loss as in the paper. Left at TRL's defaults, and good for
# it: fused AdamW, the output layer fused with the loss, GRPO's old log-probabilities not computed where there is one
# update a rollout. Not used: vLLM and Liger, which replace the generator or the kernels of either side and need a GPU; PPO has no
# gradient clipping in TRL, and one optimizer step an epoch whatever `num_mini_batches` says.
def common_arguments(spec, cuda):
    size = spec["size"]
    return dict(
        output_dir=spec["run_dir"],
        per_device_train_batch_size=size["micro"],
        max_steps=spec["steps"],
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to="tensorboard",
        save_strategy="no",
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=0,
    )


def theirs(spec):
    """TRL's trainer on the same rows in the same order."""
    watch = Watch(spec)
    import torch
    import transformers
    import trl
    from datasets import Dataset, disable_progress_bars
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from transformers.generation import GenerationMixin

    name, size = spec["algorithm"], spec["size"]
    if name == "ppo":
        from trl.experimental import ppo as rl
        from trl.experimental.ppo import ppo_trainer
    else:
        rl = getattr(
            trl, {"sft": "SFTTrainer", "reward": "RewardTrainer"}.get(name, f"{name.upper()}Trainer")
        )
        config = getattr(
            trl, {"sft": "SFTConfig", "reward": "RewardConfig"}.get(name, f"{name.upper()}Config")
        )
    watch.imported()
    disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()

    class Callback(TrainerCallback):
        def on_step_end(self, *_, **__):
            watch.step_end()

        def on_log(self, args, state, control, logs=None, **__):
            for key in ("loss", "loss/policy_avg", "objective/kl", "objective/scores"):
                if key in (logs or {}):
                    logged.setdefault(key, []).append(logs[key])

    logged, first = {}, {}
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    rows = [json.loads(line) for line in Path(spec["rows"]).read_text().splitlines()]
    arguments = common_arguments(spec, watch.cuda)
    load = lambda path, auto=AutoModelForCausalLM, **more: auto.from_pretrained(
        path, dtype=torch.float32, **more
    )
    head = dict(auto=AutoModelForSequenceClassification, num_labels=1)
    eos = tokenizer.eos_token_id

    def lengths(out, *_, **kwargs):
        """Tokens of each response up to its eos."""
        tokens = out.sequences if hasattr(out, "sequences") else out
        ids = kwargs.get("input_ids", kwargs.get("inputs"))
        ended = (tokens[:, ids.shape[1] :] == eos).cpu().int()
        return [
            n + 1 if e else ended.shape[1]
            for n, e in zip(ended.argmax(1).tolist(), ended.any(1).tolist(), strict=True)
        ]

    if name in ("grpo", "ppo"):
        GenerationMixin.generate = watch.time_rollout(
            GenerationMixin.generate, lambda out, *a, **k: lengths(out, *a, **k)
        )
    if name == "grpo":
        last = []

        def noted_reward(prompts, completions, **_):
            last[:] = reward(prompts, completions=completions)
            return last

        arguments |= dict(
            gradient_accumulation_steps=size["batch"] // size["micro"],
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
        rows = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
        extra = dict(processing_class=tokenizer, callbacks=[Callback()])
        trainer = rl(spec["model"], noted_reward, args=config(**arguments), train_dataset=rows, **extra)
        trainer.ref_model.load_state_dict(
            load(spec["ref_model"]).state_dict()
        )  # it knows no reference but the model itself
        score = trainer._generate_and_score_completions

        def noted_score(inputs):
            out = score(inputs)
            if not first:
                for kind in ("prompt", "completion"):
                    ids, masks = out[f"{kind}_ids"].tolist(), out[f"{kind}_mask"].tolist()
                    first[kind] = [
                        [i for i, m in zip(*x, strict=True) if m] for x in zip(ids, masks, strict=True)
                    ]
                first["rewards"] = list(last)
            return out

        trainer._generate_and_score_completions = noted_score
    elif name == "ppo":
        arguments |= dict(
            gradient_accumulation_steps=size["batch"] // size["micro"],
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
        rows = Dataset.from_list([{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows])
        models = dict(model=load(spec["model"]), ref_model=load(spec["ref_model"]))
        models |= dict(
            reward_model=load(spec["reward_model"], **head), value_model=load(spec["reward_model"], **head)
        )
        parts = dict(processing_class=tokenizer, train_dataset=rows, callbacks=[Callback()], **models)
        trainer = rl.PPOTrainer(rl.PPOConfig(**arguments), **parts)
        # it always shuffles; our order, so that each step has the same prompts
        loader = dict(batch_size=size["batch"], collate_fn=trainer.data_collator, drop_last=True)
        trainer.dataloader = trainer.accelerator.prepare(
            torch.utils.data.DataLoader(rows, shuffle=False, **loader)
        )
        generation, whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

        def noted_generation(model, queries, *more):
            found = generation(model, queries, *more)
            if "prompt" not in first:
                first["prompt"] = [
                    [t for t in row if t != tokenizer.pad_token_id] for row in queries.tolist()
                ]
                answers = found[0][:, queries.shape[1] :].tolist()
                first["completion"] = [a[: a.index(eos) + 1] if eos in a else a for a in answers]
            return found

        def noted_whiten(values, mask, **more):
            if (
                "value_loss" not in first
            ):  # before the first update the critic's loss is half the mean squared advantage
                first["value_loss"] = 0.5 * (values[mask] ** 2).mean().item()
            return whiten(values, mask, **more)

        ppo_trainer.batch_generation, ppo_trainer.masked_whiten = noted_generation, noted_whiten
    else:
        arguments |= dict(
            gradient_accumulation_steps=size["batch"] // size["micro"],
            train_sampling_strategy="sequential",
            max_length=None,
        )
        model, more = load(spec["model"]), {}
        if name == "reward":
            model = load(spec["reward_model"], **head)
        elif name in ("dpo", "kto"):
            arguments |= dict(beta=spec["beta"], precompute_ref_log_probs=True)
            more["ref_model"] = load(spec["ref_model"])
        fields = {"sft": ("response",), "kto": ("response", "label")}.get(name, ("chosen", "rejected"))
        names = {"response": "completion"}
        # the prompt is followed by a space, which to this tokenizer is nothing: words stay words
        rows = [
            {"prompt": r["prompt"]} | {names.get(f, f): r[f] if f == "label" else " " + r[f] for f in fields}
            for r in rows
        ]
        dataset, extra = Dataset.from_list(rows), dict(processing_class=tokenizer, callbacks=[Callback()])
        trainer = rl(model=model, args=config(**arguments), train_dataset=dataset, **extra, **more)
        if "ref_model" in more:  # with the data scored it is not needed; ours is freed too
            trainer.ref_model = None
            more.clear()
            gc.collect()
    trainer.train()
    watch.save(logged=logged, first=first, trl=trl.__version__)


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    (theirs if spec["side"] == "trl" else ours)(spec)
