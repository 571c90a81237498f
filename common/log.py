"""The run folder: arguments, metrics, samples, progress."""

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import shutil
import signal
import time
import uuid
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import distributed, durable, lora, vllm
from common.cli import fail, note
from common.data import columns_of_prompt
from common.lock import lock
from common.optimizer import warmup_of
from common.preemption import EXIT_CODE, Preemption
from common.tokenization import TOKENS

SHARED_TRIES = 30  # seconds in which a rank must see what another has written


class Run:
    """The run folder. Rank 0 alone writes; each line of metrics.jsonl is flushed, so a crash loses nothing.

    Made before anything is loaded: what cannot go on, or would overwrite an earlier run, ends here with one
    line.
    """

    def __init__(self, args):
        self.args = args
        self.dir = Path(args.run_dir)
        self.wandb = None
        self.preemption = Preemption()
        self.asked = 0  # the signal by which a rank was asked to stop
        lora.find_package(args)
        vllm.check(args)
        self.refuse_earlier_run()
        if distributed.rank() == 0:
            lock(self.dir)
        distributed.all_gather_object(None)  # every rank has looked before rank 0 writes
        if distributed.rank() == 0:
            self.prepare_folder()
            self.preemption.folder = self.dir
            self.write_arguments()
        self.require_shared_folder()

    def refuse_earlier_run(self) -> None:
        """Ends with one line where the folder holds a run that the flags neither continue nor replace."""
        metrics = self.dir / "metrics.jsonl"
        # it is empty where a check ended the run before its first number: then the folder is free
        has_metrics = metrics.exists() and metrics.stat().st_size > 0
        used = has_metrics or (self.dir / "checkpoints").exists()
        if used and not self.args.resume and not self.args.overwrite:
            fail(
                f"{self.dir} holds an earlier run: "
                "--resume continues it, --overwrite replaces it, --run-dir chooses another"
            )

    def require_shared_folder(self) -> None:
        """Ends with one line where a rank does not see what rank 0 writes: each node would keep its part of a
        checkpoint to itself."""
        if distributed.world() == 1:
            return
        mark = self.dir / "shared"
        if distributed.rank() == 0:
            mark.write_text(uuid.uuid4().hex)
        word = distributed.all_gather_object(mark.read_text() if distributed.rank() == 0 else None)[0]
        seen = False
        for _ in range(SHARED_TRIES):
            seen = mark.exists() and mark.read_text() == word
            if seen:
                break
            time.sleep(1)  # a network file system may be slow to show it
        blind = [rank for rank, saw in enumerate(distributed.all_gather_object(seen)) if not saw]
        if distributed.rank() == 0:
            mark.unlink()
        if blind:
            fail(
                f"--run-dir {self.dir}: rank {blind[0]} does not see what rank 0 writes there; on several nodes "
                "it has to be on storage that all of them share"
            )

    def prepare_folder(self) -> None:
        """Makes the folder; to overwrite, removes the checkpoints alone.

        The rest is replaced as it is written: --model may lie in this folder.
        """
        if self.args.overwrite and not self.args.resume:
            shutil.rmtree(self.dir / "checkpoints", ignore_errors=True)
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "stopped").unlink(missing_ok=True)

    def write_arguments(self) -> None:
        """args.json, with the script and the versions; says which arguments differ from those that a resumed
        run began with. Ends with one line where it is another script's run, or the file is damaged."""
        file = self.dir / "args.json"
        # as a file gives them back: tuples as lists
        now = json.loads(json.dumps(dataclasses.asdict(self.args)))
        about = {"script": Path(inspect.getfile(type(self.args))).name, "versions": versions()}
        before = dict(now)  # what the file does not say has not changed
        if file.exists() and self.args.resume:
            before |= read_object(file)
            script = before.get("script", about["script"])
            if script != about["script"]:
                fail(f"{self.dir} holds a run of {script}: --resume goes on with the same script")
            was = before.get("versions", about["versions"])
            newer = []
            for name, version in about["versions"].items():
                if was.get(name) != version:
                    newer.append(f"{name} {was.get(name)} -> {version}")
            if newer:
                note("resuming with other versions: " + ", ".join(newer))
        before |= {"resume": True, "overwrite": self.args.overwrite}  # these two differ by their nature
        lora.check(self.args, before, now)
        changed = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
        if self.args.resume and changed:
            note("resuming with other arguments: " + ", ".join(changed))
        durable.write_text(file, json.dumps(about | now, indent=1))

    def start(self, step: int, total: int, rows: list[dict]) -> None:
        """Opens the logs at `step` of `total`. `rows`: what is learned from, which a resumed run must find
        unchanged.

        On resume, what the run wrote after its checkpoint is dropped, its last evaluation too: it comes anew.
        """
        self.total = total
        if step > total:
            note(
                f"{self.dir.name}: --steps {total}, but the checkpoint is of step {step}: it is exported as it is"
            )
        self.saved_at = time.monotonic()
        self.preemption.at_once = ""  # from here on there is a step to finish
        if distributed.rank() != 0:
            return
        self.check_data(step, rows)
        self.say_plan(total, len(rows))
        for name in ("metrics.jsonl", "samples.jsonl"):
            self.keep_before(self.dir / name, step)
        # a step's answers are written before its checkpoint, so those of the checkpoint's own step stay
        self.keep_before(self.dir / "rollouts.jsonl", step, evaluations=False)
        # from `step` on events of an earlier try are hidden; a step of 0 keeps none of them
        self.writer = SummaryWriter(str(self.dir), purge_step=step + 1 if step else 0)
        self.bar = tqdm(total=total, initial=step, desc=self.dir.name, disable=None)
        if self.args.wandb:
            self.wandb = start_wandb(self.dir, step, dataclasses.asdict(self.args))

    def say_plan(self, total: int, rows: int) -> None:
        """The first line of a run: how long it is, and which learning rate it will reach."""
        args = self.args
        passes = total * args.batch_size / max(1, rows)
        warmup = warmup_of(total, args.warmup_steps)
        shortened = f", not {args.warmup_steps}" if warmup < args.warmup_steps else ""
        note(
            f"{self.dir.name}: {total} steps of {args.batch_size}, {passes:.3g} passes over {rows} rows; learning "
            f"rate {args.lr:g} after {warmup} steps of warm-up{shortened}, then {args.lr_schedule}"
        )

    def check_data(self, step: int, rows: list[dict]) -> None:
        """Keeps a hash of the data, tokens and columns. Ends with one line where a resumed run has other rows:
        their order would be another, so that some are seen twice in an epoch and some never, or what a reward
        function compares with would change."""
        judged = bool(getattr(self.args, "reward", ""))  # by a model, whose last digits depend on the ranks
        digest = hashlib.sha256()
        for row in rows:
            data = {key: value for key, value in row.items() if not (judged and key == "reward")}
            digest.update(json.dumps(data, sort_keys=True, default=str).encode())
        now = {"rows": len(rows), "sha256": digest.hexdigest()}
        file = self.dir / "data.json"
        before = read_object(file) if step and file.exists() else now
        if before != now:
            fail(
                f"{self.dir}: the data has changed since the run began ({before.get('rows')} rows, now {now['rows']}, or "
                "other contents or tokens); --resume needs the same, --overwrite begins anew"
            )
        durable.write_text(file, json.dumps(now))

    def keep_before(self, path: Path, step: int, evaluations: bool = True) -> None:
        """Keeps the lines of a .jsonl file up to a checkpoint at `step`; a fresh run keeps none. `evaluations`:
        whether it holds those, the last of which comes anew."""
        kept = []
        damaged = 0
        if step and path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            for line in lines[:-1]:  # what follows the last line's end is empty, or a line that a crash tore
                try:
                    row = json.loads(line)
                    of_step = int(row["step"])
                except (ValueError, TypeError, KeyError):  # a power cut leaves NULs, blank lines, halves
                    damaged += 1
                    continue
                # a step's own line comes before its checkpoint, an evaluation at the end of the run after it
                comes_anew = evaluations and step >= self.total and "time/step_s" not in row
                if of_step < step or (of_step == step and not comes_anew):
                    kept.append(line + "\n")
        if damaged:
            note(f"{path}: dropped {damaged} damaged lines")
        if not kept:
            path.unlink(missing_ok=True)  # some scripts write no samples
            return
        durable.write_text(path, "".join(kept))

    def metrics(self, step: int, values: dict, show: tuple[str, ...] = ()) -> None:
        """One line of metrics.jsonl and TensorBoard; `show` names those for the progress bar, which says of
        evaluations that they are."""
        if distributed.rank() != 0:
            return
        values = {key: float(value) for key, value in values.items()}
        # JSON has no NaN or infinity
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self.samples(step, [line], "metrics.jsonl")
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)
        shown = [f"{key.split('/')[-1]} {values[key]:.3g}" for key in show if key in values]
        text = " ".join(shown)
        held_out = any(key.startswith("eval/") for key in show)
        if held_out:
            text = f"held out: {text}"
        self.bar.n = step
        self.bar.set_postfix_str(text)
        every = max(1, self.total // 10)
        # not a terminal: ten lines, and the evaluations
        if self.bar.disable and (held_out or step % every == 0 or step == self.total):
            note(f"{self.dir.name} {step}/{self.total} {text}")

    def samples(self, step: int, rows: list[dict], name: str = "samples.jsonl") -> None:
        """Appends a line per row, with its step; texts go to TensorBoard as well. Only rank 0 writes."""
        if distributed.rank() != 0:
            return
        with open(self.dir / name, "a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        if name == "samples.jsonl":
            texts = [json.dumps(row, ensure_ascii=False, indent=1) for row in rows]
            self.writer.add_text("samples", "\n\n".join(f"```\n{text}\n```" for text in texts), step)

    def rollouts(
        self, step: int, rows: list[dict], texts: list[str], truncated: list[bool], numbers: dict[str, Tensor]
    ) -> None:
        """Appends the responses of a step to rollouts.jsonl, a line each: the prompt as in the data, the other
        columns of its row that a reward function may ask for, the response's text, whether it was cut, and
        `numbers` ([B] each) by name. It is data that gvm_td.py reads."""
        numbers = {name: values.tolist() for name, values in numbers.items()}
        lines = []
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            of_response = {name: values[i] for name, values in numbers.items()}
            columns = columns_of_prompt(row)
            columns = {key: value for key, value in columns.items() if key not in TOKENS}
            line = {**columns, "prompt": row["prompt"], "response": text, "truncated": truncated[i]}
            line |= of_response
            line["step"] = step  # ours, whatever the data calls by that name: a resumed run is cut by it
            lines.append(line)
        self.samples(step, lines, "rollouts.jsonl")

    def picture(self, name: str, path: str, step: int) -> None:
        """A .png file into TensorBoard."""
        if distributed.rank() == 0:
            from matplotlib.image import imread

            self.writer.add_image(name, imread(path)[..., :3], step, dataformats="HWC")

    def saves(self, done: int) -> bool:
        """Whether a checkpoint is due after step `done`: by --save-every, by --save-minutes, at the end, or
        because a rank was asked to stop. The same on every rank, which all have to ask."""
        minutes = (time.monotonic() - self.saved_at) / 60
        by_clock = 0 < self.args.save_minutes <= minutes and distributed.rank() == 0  # one clock for all
        self.asked, by_clock = distributed.largest([self.preemption.received, int(by_clock)])
        regular = self.args.save_every or self.args.save_minutes
        by_step = self.args.save_every and done % self.args.save_every == 0
        last = done == self.total
        due = bool(self.asked or by_clock or by_step or (regular and last))
        if due:
            self.saved_at = time.monotonic()
        return due

    def stop_if_asked(self, done: int) -> None:
        """After a checkpoint: ends the run where a rank was asked to stop, with a line and a code of its
        own."""
        if not self.asked and done == self.total:
            self.preemption.at_once = f"after step {done}, which is saved; --resume writes the model"
            # one that came while the checkpoint was written: no step comes that would ask
            self.asked = distributed.largest([self.preemption.received])[0]
        if not self.asked:
            return
        distributed.all_gather_object(None)  # the checkpoint is whole
        if distributed.rank() == 0:
            self.writer.close()
            self.bar.close()
            name = signal.Signals(self.asked).name
            durable.write_text(
                self.dir / "stopped", f"{name} after step {done}\n"
            )  # docs/slurm.sh looks for it
            note(
                f"{self.dir.name}: {name}: stopped after step {done} of {self.total}, which is saved; the same "
                "command with --resume goes on"
            )
        # a rank that ends first makes torchrun send the others a signal, which is no second one of the user's
        self.preemption.finished()
        raise SystemExit(EXIT_CODE)

    def close(self, what_next: str) -> None:
        """Writes out TensorBoard's events, ends the progress bar, and says where the model is and `what_next`
        to run with it."""
        self.preemption.close()
        if distributed.rank() != 0:
            return
        self.writer.close()
        self.bar.close()
        note(f"{self.dir.name}: done. The model is in {self.dir}/model; next: {what_next}")
        checkpoints = self.dir / "checkpoints"
        size = sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file())
        if size:
            note(
                f"{self.dir.name}: {checkpoints} ({size / 1e6:,.0f} MB) is for --resume with more steps alone"
            )


def read_object(file: Path) -> dict:
    """What a run has written of itself. Ends with one line where that is damaged: --resume compares with it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        fail(f"{file} is damaged, so --resume has nothing to compare with; --overwrite begins anew")
    return found


def versions() -> dict[str, str]:
    """Of Python and of the packages that results may depend on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "datasets", "numpy"):
        found[package] = importlib.metadata.version(package)
    return found


def start_wandb(folder: Path, step: int, config: dict):
    """A run, named after its folder; a resumed one (`step` above 0) goes on in the same.

    Ends with one line where the package is missing.
    """
    try:
        import wandb
    except ImportError:
        fail("--wandb needs the package: pip install wandb")
    # without a key it would ask for a login
    os.environ.setdefault("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline")
    file = folder / "wandb_id"
    if not (step and file.exists()):
        file.write_text(wandb.util.generate_id())
    return wandb.init(
        project="value-first", config=config, name=str(folder), id=file.read_text(), resume="allow"
    )
