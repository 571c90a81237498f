"""The figures of docs/reliability.md, each by doing it: runs that are killed, asked to stop, whose checkpoints are damaged,
whose disk is full. GPU-free.

    make faults                                                        # an hour on two cores
    OMP_NUM_THREADS=1 python benchmarks/faults.py --kills 20 --signals 20

Runs of eight steps, on small random data, of every script in turn. What they leave is compared with a run that nobody
disturbed: the weights byte for byte, and every number and text of the logs. Writes OUT/faults.json, and ends with code 1
where something was lost. The tests (tests/test_resume.py, tests/test_damage.py) do the same a few times.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# for the processes that helpers starts
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers
from test_damage import flip_a_bit, full_after_the_start, full_in_the_checkpoint, halve
from test_resume import ARGS, STEPS, assert_identical, rows_written

from common.preemption import EXIT_CODE, SIGNALS

LIMIT = 300  # seconds after which a run counts as hanging


class Hang(Exception):
    """A run that did not end within LIMIT."""


class Bench:
    """The folder in which all runs are, and the runs that nobody disturbed."""

    def __init__(self, out: Path, seed: int):
        self.world = helpers.World(out)
        helpers.make_world(out)
        self.random = random.Random(seed)

    def unbroken(self, script: str) -> Path:
        """The folder of a run that nobody disturbed, made once."""
        run_dir = f"runs/unbroken-{script}"
        folder = self.world.path(run_dir)
        if not (folder / "model").exists():
            self.run(script, run_dir).ok()
        return folder

    def run(self, script: str, run_dir: str, ranks: int = 0, patch=None, **args) -> helpers.Result:
        return self.end(self.world.start(script, ranks, patch, **ARGS[script] | args, run_dir=run_dir))

    def end(self, job: helpers.Job) -> helpers.Result:
        """Waits for a run. Raises Hang."""
        try:
            return job.wait(LIMIT)
        except AssertionError as error:
            raise Hang(str(error)) from None

    def start_until(self, script: str, run_dir: str, rows: int) -> helpers.Job:
        """A run that has logged so many rows."""
        job = self.world.start(script, **ARGS[script], run_dir=run_dir)
        begin = time.monotonic()
        while rows_written(self.world.path(run_dir)) < rows:
            assert job.alive(0.002), self.end(job).output
            if time.monotonic() > begin + LIMIT:
                job.kill()
                raise Hang(run_dir)
        return job

    def rows_before_the_last(self, script: str) -> int:
        """A random number of rows after which there are more to come."""
        first = 1 + (script in helpers.ONLINE)  # theirs has the evaluation of step 0
        return self.random.randrange(first, first + STEPS - 2)


def kills(bench: Bench, i: int) -> str:
    """SIGKILL at a random moment, then --resume."""
    script = helpers.SCRIPTS[i % len(helpers.SCRIPTS)]
    unbroken = bench.unbroken(script)
    run_dir = f"runs/kill-{i}"
    job = bench.start_until(script, run_dir, bench.rows_before_the_last(script))
    job.alive(bench.random.uniform(0, 0.05))
    job.kill()
    bench.run(script, run_dir, resume=True).ok()
    assert_identical(bench.world.path(run_dir), unbroken)
    return "bit for bit the unbroken run"


def signals(bench: Bench, i: int) -> str:
    """A signal at a random moment: the step in flight is saved, nothing else is lost. Then --resume."""
    script = helpers.SCRIPTS[i % len(helpers.SCRIPTS)]
    number = SIGNALS[i % len(SIGNALS)]
    unbroken = bench.unbroken(script)
    run_dir = f"runs/signal-{i}"
    folder = bench.world.path(run_dir)
    job = bench.start_until(script, run_dir, bench.rows_before_the_last(script))
    job.alive(bench.random.uniform(0, 0.05))
    rows = rows_written(folder)
    if job.processes[0].exitcode is None:
        os.kill(job.processes[0].pid, number)
    result = bench.end(job)
    late = result.codes == [0]  # it had ended
    assert late or result.codes == [EXIT_CODE], result.output
    if not late:
        newest = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
        logged = [row["step"] for row in helpers.metrics(folder)]
        assert rows_written(folder) >= rows and newest == logged[-1], (newest, logged)
    bench.run(script, run_dir, resume=True).ok()
    assert_identical(folder, unbroken)
    name = signal.Signals(number).name
    return "had ended before" if late else f"{name}: the step in flight saved, then bit for bit"


def flip_anywhere(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


DAMAGES = {
    "a bit": flip_anywhere,
    "the middle bit": lambda path, rng: flip_a_bit(path),
    "halved": lambda path, rng: halve(path),
    "cut": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    "missing": lambda path, rng: path.unlink(),
    "zeros": lambda path, rng: path.write_bytes(bytes(path.stat().st_size)),
    "one more": lambda path, rng: path.with_name("stray").write_text("x"),
}


def damages(bench: Bench, i: int) -> str:
    """A random file of the newest checkpoint is damaged; of each third run, of both checkpoints. Then --resume."""
    script = helpers.SCRIPTS[i % len(helpers.SCRIPTS)]
    how = list(DAMAGES)[i % len(DAMAGES)]
    unbroken = bench.unbroken(script)
    run_dir = f"runs/damage-{i}"
    folder = bench.world.path(run_dir)
    shutil.copytree(unbroken, folder)
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    both = i % 3 == 2
    for checkpoint in checkpoints if both else checkpoints[-1:]:
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
        DAMAGES[how](bench.random.choice(files), bench.random)
    result = bench.run(script, run_dir, resume=True)
    if both:
        assert "no checkpoint is whole" in result.error()
        return "both damaged: named in one line"
    assert result.ok().output.count("is set aside as damaged-") == 1
    assert_identical(folder, unbroken)
    return "the newest damaged: named, healed from the one before, bit for bit"


def disks(bench: Bench, i: int) -> str:
    """A disk that is full at a log's line, or at a checkpoint; one rank or two."""
    script = helpers.SCRIPTS[i % len(helpers.SCRIPTS)]
    patch = (full_after_the_start, full_in_the_checkpoint)[i % 2]
    run_dir = f"runs/disk-{i}"
    line = bench.run(script, run_dir, ranks=(0, 2)[i // 2 % 2], patch=patch).error()
    assert line == f"error: no space left on {run_dir}; what was saved before is whole"
    return "one line"


FAULTS = (kills, signals, damages, disks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help=kills.__doc__)
    parser.add_argument("--signals", type=int, default=50, help=signals.__doc__)
    parser.add_argument("--damages", type=int, default=30, help=damages.__doc__)
    parser.add_argument("--disks", type=int, default=12, help=disks.__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places (default 0)")
    parser.add_argument(
        "--out", default="runs/faults", help="folder, which is replaced (default runs/faults)"
    )
    args = parser.parse_args()
    out = Path(args.out).resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    bench = Bench(out, args.seed)
    begin = time.monotonic()
    found = {}
    for fault in FAULTS:
        name = fault.__name__
        found[name] = {"tried": 0, "right": 0, "hangs": 0, "outcomes": {}, "wrong": []}
        for i in range(getattr(args, name)):
            found[name]["tried"] += 1
            try:
                outcome = fault(bench, i)
            except Hang as error:
                found[name]["hangs"] += 1
                found[name]["wrong"].append(f"{i}: hangs: {error}")
            except Exception as error:  # whatever is not as it should be is counted and kept
                found[name]["wrong"].append(f"{i}: {type(error).__name__}: {error}")
            else:
                found[name]["right"] += 1
                outcomes = found[name]["outcomes"]
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
                for folder in bench.world.path("runs").glob(f"{name[:-1]}-{i}"):
                    shutil.rmtree(folder)
            (out / "faults.json").write_text(json.dumps(found, indent=1))
        counts = found[name]
        print(
            f"{name}: {counts['right']} of {counts['tried']} right, {counts['hangs']} hangs, "
            f"{json.dumps(counts['outcomes'])}",
            flush=True,
        )
    print(f"{(time.monotonic() - begin) / 60:.0f} minutes; {out}/faults.json")
    wrong = [line for counts in found.values() for line in counts["wrong"]]
    for line in wrong:
        print(line[:2000])
    if wrong:
        raise SystemExit(f"error: {len(wrong)} not as they should be")


if __name__ == "__main__":
    main()
