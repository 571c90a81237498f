"""The run folder: arguments, metrics, samples, progress."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import distributed, lora, vllm
from common.cli import fail, note


class Run:
    """The run folder. Rank 0 alone writes; each line of metrics.jsonl is flushed, so a crash loses nothing."""

    def __init__(self, args):
        self.args, self.dir, self.wandb = args, Path(args.run_dir), None
        lora.find_package(args)
        vllm.check(args)
        metrics = self.dir / "metrics.jsonl"  # empty where a check ended the run before its first number
        used = (metrics.exists() and metrics.stat().st_size) or (self.dir / "checkpoints").exists()
        if used and not args.resume and not args.overwrite:
            fail(
                f"{self.dir} holds an earlier run: --resume continues it, --overwrite replaces it, --run-dir chooses another"
            )
        distributed.all_gather_object(None)  # every rank has looked before rank 0 writes
        if distributed.rank() == 0:
            if (
                args.overwrite and not args.resume
            ):  # the rest is replaced as it is written: --model may lie in this folder
                shutil.rmtree(self.dir / "checkpoints", ignore_errors=True)
            self.dir.mkdir(parents=True, exist_ok=True)
            now, file = json.loads(json.dumps(dataclasses.asdict(args))), self.dir / "args.json"
            before = (
                now
                | (json.loads(file.read_text()) if file.exists() else {})
                | {"resume": True, "overwrite": args.overwrite}
            )
            changed = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
            lora.check(args, before, now)
            if args.resume and changed:
                note("resuming with other arguments: " + ", ".join(changed))
            file.write_text(json.dumps(now, indent=1))

    def start(self, step: int, total: int) -> None:
        """Opens the logs at `step`: on resume, what a run wrote after its checkpoint, the last evaluation too, comes anew."""
        self.total = total
        if distributed.rank() != 0:
            return
        for path in (self.dir / "metrics.jsonl", self.dir / "samples.jsonl"):
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() and step else ""
            before = lambda row: (
                row["step"] < step or (row["step"] == step and (step < total or "time/step_s" in row))
            )
            kept = [
                line + "\n" for line in text.split("\n")[:-1] if before(json.loads(line))
            ]  # a torn line has no end
            path.with_suffix(".part").write_text("".join(kept), encoding="utf-8")
            path.with_suffix(".part").rename(path)
        self.writer = SummaryWriter(str(self.dir), purge_step=step + bool(step))
        self.bar = tqdm(total=total, initial=step, desc=self.dir.name, disable=None)
        if self.args.wandb:
            self.wandb = start_wandb(self.dir, step, dataclasses.asdict(self.args))

    def metrics(self, step: int, values: dict, show: tuple[str, ...] = ()) -> None:
        """One line of metrics.jsonl and TensorBoard; `show` names those beside the progress bar."""
        if distributed.rank() != 0:
            return
        values = {key: float(value) for key, value in values.items()}
        self.samples(step, [{k: v if math.isfinite(v) else None for k, v in values.items()}], "metrics.jsonl")
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)
        text = " ".join(f"{key.split('/')[-1]} {values[key]:.3g}" for key in show if key in values)
        self.bar.n = step
        self.bar.set_postfix_str(text)
        if self.bar.disable and (
            step % max(1, self.total // 10) == 0 or step == self.total
        ):  # not a terminal: ten lines
            note(f"{self.dir.name} {step}/{self.total} {text}")

    def samples(self, step: int, rows: list[dict], name: str = "samples.jsonl") -> None:
        with open(self.dir / name if distributed.rank() == 0 else os.devnull, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)

    def close(self) -> None:
        for part in (self.writer, self.bar) if distributed.rank() == 0 else ():
            part.close()


def start_wandb(folder: Path, step: int, config: dict):
    """A run, named after its folder; a resumed one (`step` above 0) goes on in the same."""
    try:
        import wandb
    except ImportError:
        fail("--wandb needs the package: pip install wandb")
    os.environ.setdefault(
        "WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline"
    )  # no login prompt
    file = folder / "wandb_id"
    file.write_text(file.read_text() if step and file.exists() else wandb.util.generate_id())
    return wandb.init(
        project="value-first", config=config, name=str(folder), id=file.read_text(), resume="allow"
    )
