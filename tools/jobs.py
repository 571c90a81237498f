"""Runs commands that need one another's folders, several at a time; resumes where it was stopped; says how long it will take.

A job is a name and a command of one of the scripts. `{home}` in it is the folder of the seed, `{out}` the folder of all seeds;
a job that names `{home}/x/...` or `{out}/x/...` waits for job x. What has finished has a `job.json` (command, seconds, commit,
date) and is not run again, unless its command is another now. A log lies beside each folder.
"""

import concurrent.futures
import datetime
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The short hash of the working tree's commit, with + where files have changed since; '' outside a repository."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno", "--", "*.py"], capture_output=True, text=True
    ).stdout.strip()
    return found + "+" * bool(changed)


class Jobs:
    """The jobs `wanted` ((seed, name) each) of `commands` (name -> list of words) and all they need; `shared`: without seed."""

    def __init__(
        self, out: Path, commands: dict[str, list[str]], wanted: list[tuple[int, str]], shared: set[str]
    ):
        self.out, self.commands, self.order, self.needs = out, commands, [], {}
        for seed, name in wanted:
            self._add((None if name in shared else seed, name))

    def _add(self, job: tuple[int | None, str]) -> None:
        seed, name = job
        if job in self.needs:
            return
        words = " ".join(self.commands[name])
        needed = [(None, x) for x in re.findall(r"\{out\}/(\w+)", words) if x in self.commands]
        needed += [(seed, x) for x in re.findall(r"\{home\}/(\w+)", words) if x in self.commands]
        self.needs[job] = set(needed)
        for other in needed:
            self._add(other)
        self.order.append(job)

    def folder(self, job: tuple[int | None, str]) -> Path:
        seed, name = job
        return self.out / name if seed is None else self.out / f"seed{seed}" / name

    def words(self, job: tuple[int | None, str]) -> list[str]:
        seed = job[0]
        home = self.out if seed is None else self.out / f"seed{seed}"
        return [word.format(out=self.out, home=home, seed=seed or 0) for word in self.commands[job[1]]]

    def done(self, job) -> bool:
        file = self.folder(job) / "job.json"
        return file.exists() and json.loads(file.read_text())["command"] == self.words(job)

    def _run(self, job) -> float:
        folder, start = self.folder(job), time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").unlink(missing_ok=True)
        words = self.words(job)
        with open(f"{folder}.log", "w") as log:
            log.write("$ python " + " ".join(words) + "\n")
            log.flush()
            command = [sys.executable, str(ROOT / words[0]), *words[1:], "--run-dir", str(folder)]
            code = subprocess.run(command, stdout=log, stderr=log).returncode
        if code:
            raise RuntimeError(f"{words[0]} failed, see {folder}.log")
        seconds = time.perf_counter() - start
        when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        record = dict(command=words, seconds=round(seconds, 1), commit=commit(), date=when)
        (folder / "job.json").write_text(json.dumps(record, indent=1))
        return seconds

    def run(self, workers: int) -> None:
        """All jobs that are not done yet, `workers` at a time, in the order asked for. One that fails takes those with it that
        need it; the others go on, and the end is a line about it."""
        left, running, start = [job for job in self.order if not self.done(job)], {}, time.perf_counter()
        took, total, failed = {}, len(left), {}
        for job in set(self.order) - set(left):
            took.setdefault(job[1], []).append(
                json.loads((self.folder(job) / "job.json").read_text())["seconds"]
            )
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            while left or running:
                for job in [job for job in left if self.needs[job] & set(failed)]:
                    left.remove(job)
                    failed[job] = f"{self.folder(job)} needs what failed"
                ready = [job for job in left if not self.needs[job] & {*left, *running.values()}]
                for job in ready[: workers - len(running)]:
                    left.remove(job)
                    running[pool.submit(self._run, job)] = job
                for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                    job = running.pop(future)
                    if future.exception():
                        failed[job] = str(future.exception())
                        print(f"error: {failed[job]}", flush=True)
                        continue
                    took.setdefault(job[1], []).append(future.result())
                    mean = statistics.fmean(
                        x for xs in took.values() for x in xs
                    )  # of a job that has not run yet
                    rest = in_words(
                        sum(statistics.fmean(took.get(name, [mean])) for _, name in left) / workers
                    )
                    name, minutes = self.folder(job).relative_to(self.out), (time.perf_counter() - start) / 60
                    count, seconds = f"{total - len(left) - len(running)}/{total}", f"{future.result():.0f} s"
                    print(f"[{count}] {name}: {seconds}; {minutes:.0f} min so far, {rest} left", flush=True)
        if failed:
            sys.exit(
                f"error: {len(failed)} of {total} runs are missing; the same command goes on\n"
                + "\n".join(failed.values())
            )


def in_words(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds > 90 else f"about {seconds:.0f} s"
