"""Runs commands that need one another's folders, several at a time; resumes where it was stopped; says how
long it will take.

A job is a name and a command of one of the scripts. `{home}` in it is the folder of the seed, `{out}` the
folder of all seeds; a job that names `{home}/x/...` or `{out}/x/...` waits for job x. What has finished has a
`job.json` (command, seconds, commit, date) and is not run again, unless its command is another now. A log
lies next to each folder.
"""

import concurrent.futures
import datetime
import json
import multiprocessing
import os
import re
import runpy
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The short hash of the working tree's commit, with + where files have changed since; '' outside a
    repository."""
    found = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "-uno", "--", "*.py")
    if changed:
        return found + "+"
    return found


def git(*words: str) -> str:
    """What a git command prints about this project; '' where it fails."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def in_words(seconds: float) -> str:
    """A time to wait, in minutes or seconds."""
    if seconds > 90:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds:.0f} s"


class Job(NamedTuple):
    """One command; `seed` is None for a job that all seeds share."""

    seed: int | None
    name: str


class Jobs:
    """The jobs `wanted` ((seed, name) each) and all they need.

    `commands` gives each name its list of words, `shared` the names that are run once for all seeds.
    """

    def __init__(
        self, out: Path, commands: dict[str, list[str]], wanted: list[tuple[int, str]], shared: set[str]
    ):
        self.out = out
        self.commands = commands
        self.order: list[Job] = []  # a job comes after all that it needs
        self.needs: dict[Job, set[Job]] = {}
        for seed, name in wanted:
            self._add(Job(None if name in shared else seed, name))

    def _add(self, job: Job) -> None:
        """Puts a job behind those that it needs, once."""
        if job in self.needs:
            return
        words = " ".join(self.commands[job.name])
        needed = []
        for name in re.findall(r"\{out\}/(\w+)", words):
            if name in self.commands:
                needed.append(Job(None, name))
        for name in re.findall(r"\{home\}/(\w+)", words):
            if name in self.commands:
                needed.append(Job(job.seed, name))
        self.needs[job] = set(needed)
        for other in needed:
            self._add(other)
        self.order.append(job)

    def home(self, job: Job) -> Path:
        """The folder that holds the folders of a job's seed."""
        if job.seed is None:
            return self.out
        return self.out / f"seed{job.seed}"

    def folder(self, job: Job) -> Path:
        """The run folder of a job."""
        return self.home(job) / job.name

    def words(self, job: Job) -> list[str]:
        """The command of a job, its braces filled in."""
        home = self.home(job)
        seed = job.seed or 0
        return [word.format(out=self.out, home=home, seed=seed) for word in self.commands[job.name]]

    def record(self, job: Job) -> dict:
        """What a finished job left."""
        return json.loads((self.folder(job) / "job.json").read_text())

    def done(self, job: Job) -> bool:
        """Whether a job has finished, with the command that it has now."""
        file = self.folder(job) / "job.json"
        return file.exists() and self.record(job)["command"] == self.words(job)

    def call(self, words: list[str], log) -> int:
        """Runs a script with its flags and sends what it prints to `log`, an open file; its exit status."""
        return subprocess.run([sys.executable, *words], stdout=log, stderr=log).returncode

    def _run(self, job: Job) -> float:
        """Runs a job to its end; its seconds. Raises RuntimeError where the script fails."""
        start = time.perf_counter()
        folder = self.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        # gone while it runs: a job that is stopped half way must not count as finished
        (folder / "job.json").unlink(missing_ok=True)
        words = self.words(job)
        with open(f"{folder}.log", "w") as log:
            log.write("$ python " + " ".join(words) + "\n")
            log.flush()
            code = self.call([str(ROOT / words[0]), *words[1:], "--run-dir", str(folder)], log)
        if code:
            raise RuntimeError(f"{words[0]} failed, see {folder}.log")
        seconds = time.perf_counter() - start
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        record = {"command": words, "seconds": round(seconds, 1), "commit": commit(), "date": date}
        (folder / "job.json").write_text(json.dumps(record, indent=1))
        return seconds

    def run(self, workers: int, finished: Callable[[Job], None] | None = None) -> None:
        """All jobs that are not done yet, `workers` at a time, in the order asked for; `finished` is called
        with each as it ends.

        A job that fails takes those with it that need it. The others go on, and the end is an error with a
        line about each.
        """
        start = time.perf_counter()
        waiting = [job for job in self.order if not self.done(job)]
        total = len(waiting)
        running: dict[concurrent.futures.Future, Job] = {}
        failed: dict[Job, str] = {}
        took: dict[str, list[float]] = defaultdict(list)  # seconds by name, of all seeds
        for job in set(self.order) - set(waiting):
            took[job.name].append(self.record(job)["seconds"])
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            while waiting or running:
                for job in list(waiting):
                    if self.needs[job] & set(failed):
                        waiting.remove(job)
                        failed[job] = f"{self.folder(job)} needs what failed"
                unfinished = {*waiting, *running.values()}
                ready = [job for job in waiting if not self.needs[job] & unfinished]
                for job in ready[: workers - len(running)]:
                    waiting.remove(job)
                    running[pool.submit(self._run, job)] = job
                ended = concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done
                for future in ended:
                    job = running.pop(future)
                    if future.exception():
                        failed[job] = str(future.exception())
                        print(f"error: {failed[job]}", flush=True)
                        continue
                    took[job.name].append(future.result())
                    if finished is not None:
                        finished(job)
                    number = total - len(waiting) - len(running)
                    name = self.folder(job).relative_to(self.out)
                    minutes = (time.perf_counter() - start) / 60
                    rest = in_words(expected_seconds(waiting, took) / workers)
                    print(
                        f"[{number}/{total}] {name}: {future.result():.0f} s; "
                        f"{minutes:.0f} min so far, {rest} left",
                        flush=True,
                    )
        if failed:
            first = f"error: {len(failed)} of {total} runs are missing; the same command goes on"
            sys.exit("\n".join([first, *failed.values()]))


def run_script(words: list[str], log: str) -> None:
    """A script with its flags in this process, which prints to the file `log`."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


class WarmJobs(Jobs):
    """Jobs whose processes are forked from one that has imported torch and transformers already: importing
    takes half of the time of a run of seconds."""

    def call(self, words: list[str], log) -> int:
        """As `Jobs.call`."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["common.models", "transformers.models.llama.modeling_llama"])
        process = context.Process(target=run_script, args=(words, log.name))
        process.start()
        process.join()
        return process.exitcode


def expected_seconds(waiting: list[Job], took: dict[str, list[float]]) -> float:
    """Of the jobs that are left, from those of the same name; one that has not run yet counts as the mean of
    all."""
    everything = [seconds for runs in took.values() for seconds in runs]
    mean = statistics.fmean(everything)
    total = 0
    for job in waiting:
        runs = took.get(job.name, [mean])
        total += statistics.fmean(runs)
    return total
