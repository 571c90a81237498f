"""Signals: the step in flight is saved and the run ends with a code of its own. One run a folder. Checkpoints by the clock."""

import os
import re
import signal
import subprocess
import sys
import time

import helpers
import pytest
from test_resume import ARGS, assert_identical, rows_written
from test_resume import unbroken as unbroken  # a fixture

from common.preemption import EXIT_CODE, SAME

LONG = dict(steps=4000, save_every=0, eval_every=0)  # nobody waits for its end


def start_until(world, script, run_dir, rows=2, ranks=0, patch=None, **args):
    """A run that has logged so many rows."""
    job = world.start(script, ranks, patch, **ARGS[script] | args, run_dir=run_dir)
    while rows_written(world.path(run_dir)) < rows:
        assert job.alive(0.005), job.wait().output
    return job


def checkpoints_of(world, run_dir) -> list[str]:
    """The names of the folders of checkpoints."""
    return sorted(path.name for path in (world.path(run_dir) / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    "name, ranks, which", [("SIGTERM", 0, 0), ("SIGINT", 0, 0), ("SIGUSR1", 2, 0), ("SIGTERM", 2, 1)]
)
def test_a_signal_to_one_rank_saves_the_step_and_ends_all(world, name, ranks, which):
    run_dir = f"runs/signal-{name}-{ranks}"
    job = start_until(world, "sft", run_dir, ranks=ranks, **LONG)
    os.kill(job.processes[which].pid, getattr(signal, name))
    result = job.wait()
    assert result.codes == [EXIT_CODE] * max(1, ranks), result.output
    assert "Traceback" not in result.output
    step = int(re.search(rf"{name}: stopped after step (\d+) of 4000, which is saved", result.output)[1])
    assert checkpoints_of(world, run_dir) == [f"step-{step:06d}"]
    # nothing is lost, and nothing is there that is not saved
    assert rows_written(world.path(run_dir)) == step
    assert (world.path(run_dir) / "stopped").read_text() == f"{name} after step {step}\n"


@pytest.mark.parametrize("script", ["dvpo", "gvm_td", "rpo"])
def test_a_run_that_was_stopped_goes_on_as_if_unbroken(world, unbroken, script):
    """Bit for bit the run that nobody stopped. The three have state of their own besides policy and optimizer."""
    run_dir = f"runs/stopped-{script}"
    rows = 3 if script in helpers.ONLINE else 2
    job = start_until(world, script, run_dir, rows=rows)
    os.kill(job.processes[0].pid, signal.SIGTERM)
    result = job.wait()
    assert result.codes == [EXIT_CODE], result.output
    world.run(script, **ARGS[script], run_dir=run_dir, resume=True).ok()
    assert_identical(world.path(run_dir), unbroken(script))


@pytest.mark.parametrize("script", helpers.SCRIPTS)
def test_every_script_asks_after_each_step(script):
    """The lines are the same in all of them."""
    text = (helpers.ROOT / f"{script}.py").read_text()
    save = text[text.index("        # --- save\n") :]
    assert re.match(
        r"        # --- save\n        if run.saves\(done\):\n(            .*\n)*?"
        r"            save_checkpoint\(args.run_dir, done, .*\)\n            run.stop_if_asked\(done\)\n",
        save,
    )


STAND_INS = {  # for the programs of a cluster
    "srun": 'exec "$@"',
    "torchrun": 'echo $$ > "$BIN/pid"; exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=1 "${@:2}"',
    "scontrol": 'echo "$@" > "$BIN/requeued"',
}


def test_the_slurm_script_requeues_what_was_stopped(tmp_path):
    """The script of docs/ under a stand-in for the scheduler: a signal before the limit, a requeue, the end."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    run_dir = tmp_path / "run"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "BIN": str(tmp_path),
        "PYTHON": sys.executable,
        "RUN": str(run_dir),
        "SLURM_JOB_ID": "7",
    }

    def job(*flags):
        words = ["bash", "docs/slurm.sh", "--eval-every", "0", "--batch-size", "8", "--mini-batch-size", "8"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen([*words, *flags], cwd=helpers.ROOT, env=environment, **pipes)

    first = job("--steps", "4000")
    while rows_written(run_dir) < 2:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 0, output
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    step = int((run_dir / "stopped").read_text().split()[-1])
    assert not (run_dir / "model").exists()

    (tmp_path / "requeued").unlink()
    second = job("--steps", str(step + 1))
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0 and f"done: {run_dir}/model" in output, output
    assert [row["step"] for row in helpers.metrics(run_dir)][-1] == step + 1
    assert not (tmp_path / "requeued").exists()


def signal_in_the_last_save(module):
    """SIGTERM to the process itself as it writes the checkpoint of the last step."""
    save = module.save_checkpoint

    def saved(run_dir, step, *rest):
        if step == ARGS["sft"]["steps"]:
            os.kill(os.getpid(), signal.SIGTERM)
        save(run_dir, step, *rest)

    module.save_checkpoint = saved


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_signal_in_the_last_checkpoint_is_not_forgotten(world, unbroken, ranks):
    """No step comes after it that would ask, and the last evaluation may be long."""
    run_dir = f"runs/signal-last-{ranks}"
    result = world.run("sft", ranks, signal_in_the_last_save, **ARGS["sft"], run_dir=run_dir)
    assert result.codes == [EXIT_CODE] * max(1, ranks), result.output
    assert "SIGTERM: stopped after step 8 of 8, which is saved" in result.output
    assert not (world.path(run_dir) / "model").exists()
    world.run("sft", ranks, **ARGS["sft"], run_dir=run_dir, resume=True).ok()
    if ranks == 0:
        assert_identical(world.path(run_dir), unbroken("sft"))


def slow_export(module):
    """The export takes a minute."""
    module.export = lambda *_, **__: time.sleep(60)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_after_the_last_step_ends_at_once(world, name):
    """SIGUSR1 leaves the word that docs/slurm.sh looks for. SIGTERM does not: torchrun sends it where another rank
    has failed, and a run that fails is not to be queued again and again."""
    run_dir = f"runs/signal-{name}-export"
    job = world.start("sft", patch=slow_export, **ARGS["sft"], run_dir=run_dir)
    while not (world.path(run_dir) / "checkpoints/step-000008").exists():
        assert job.alive(0.01), job.wait().output
    assert job.alive(1)  # the last evaluation is over by then
    os.kill(job.processes[0].pid, getattr(signal, name))
    result = job.wait(20)
    assert result.codes == [EXIT_CODE]
    line = f"{name}: stopped after step 8, which is saved; --resume writes the model"
    assert result.output.splitlines()[-1] == line
    assert (world.path(run_dir) / "stopped").exists() == (name == "SIGUSR1")


def test_a_rank_that_is_silent_ends_the_other_in_one_line(world):
    """A process that is stopped, a node without power, a link that is gone: nobody says so. --timeout-minutes is the
    bound."""
    job = start_until(world, "sft", "runs/silent", ranks=2, **LONG, timeout_minutes=0.1)
    os.kill(job.processes[1].pid, signal.SIGSTOP)
    job.processes[0].join(60)
    code = job.processes[0].exitcode
    job.kill()
    result = job.wait()
    assert code == 1, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    assert "error: rank 0 has lost another rank: " in lines[0] and "Timed out waiting 6000ms" in lines[0]


def test_a_rank_that_never_comes_is_one_line(world):
    """A node that does not start: --timeout-minutes is the bound again."""
    environment = os.environ | dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    environment["MASTER_PORT"] = str(helpers.free_port())
    words = [sys.executable, str(helpers.ROOT / "sft.py"), "--timeout-minutes", "0.05"]
    result = subprocess.run(
        words, cwd=world.folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: the 2 ranks have not met (DistStoreError: ")


def slow_save(module):
    """Saving takes a minute."""
    module.save_checkpoint = lambda *_: time.sleep(60)


def test_a_second_signal_ends_at_once(world):
    job = start_until(world, "sft", "runs/signal-twice", patch=slow_save, **LONG)
    os.kill(job.processes[0].pid, signal.SIGTERM)
    assert job.alive(SAME / 4)
    os.kill(job.processes[0].pid, signal.SIGTERM)  # what torchrun passes on is the same signal
    assert job.alive(SAME)
    os.kill(job.processes[0].pid, signal.SIGTERM)
    result = job.wait(20)
    assert result.codes == [128 + signal.SIGTERM]
    assert result.output.splitlines()[-1] == "SIGTERM again: ended at once"


def slow_load(module):
    """The tokenizer takes a minute."""
    module.load_tokenizer = lambda *_: time.sleep(60)


def test_a_signal_before_the_first_step_ends_at_once(world):
    job = world.start("sft", patch=slow_load, **ARGS["sft"], run_dir="runs/signal-early")
    while not world.path("runs/signal-early/args.json").exists():
        assert job.alive(0.01)
    os.kill(job.processes[0].pid, signal.SIGTERM)
    result = job.wait(20)
    assert result.codes == [EXIT_CODE]
    assert result.output.splitlines()[-1] == "SIGTERM: stopped before the first step"
    world.run("sft", **helpers.ARGS["sft"], run_dir="runs/signal-early").ok()  # the folder is free


def test_one_run_a_folder(world):
    """A second run ends in one line, whatever its flags, and the first goes on; a dead one holds nothing."""
    job = start_until(world, "sft", "runs/locked", **LONG)
    before = rows_written(world.path("runs/locked"))
    for flags in (dict(resume=True), dict(overwrite=True)):
        error = world.run("sft", **ARGS["sft"], **flags, run_dir="runs/locked").error()
        assert f"another run writes there (process {job.processes[0].pid} on " in error
    while rows_written(world.path("runs/locked")) <= before:
        assert job.alive(0.005), job.wait().output
    job.kill()
    world.run("sft", **helpers.ARGS["sft"], run_dir="runs/locked", overwrite=True).ok()


def test_checkpoints_by_the_clock(world):
    args = helpers.ARGS["sft"] | dict(steps=4, keep=9, run_dir="runs/clock")
    world.run("sft", **args | dict(save_every=0, save_minutes=1e-9)).ok()
    assert checkpoints_of(world, "runs/clock") == [f"step-{step:06d}" for step in (1, 2, 3, 4)]
    args["overwrite"] = True
    world.run("sft", **args | dict(save_every=0, save_minutes=1e9)).ok()
    assert checkpoints_of(world, "runs/clock") == ["step-000004"]  # the end is always saved
    world.run("sft", **args | dict(save_every=3, save_minutes=1e9)).ok()
    assert checkpoints_of(world, "runs/clock") == ["step-000003", "step-000004"]
