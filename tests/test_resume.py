"""A run that was killed and resumed ends as one that was not, and the run folder is whole throughout."""

import functools
import json
import os
import random
import shutil

import helpers
import pytest

STEPS = 8
EVERY = 2
ARGS = {
    script: args
    | dict(steps=STEPS, save_every=EVERY, keep=2, eval_every=3, lr_schedule="linear", warmup_steps=2)
    for script, args in helpers.ARGS.items()
}
ARGS["gvm_td"] |= dict(normalise_values=True, context_pairs=1, context_length=8)
# beta and the pool of answers are restored
ARGS["dvpo"] |= dict(kl_target=0.1, beta=0.2, gvm="runs/signs-context", log_odds=True)
ARGS["ppo"] |= dict(kl_target=0.1, beta=0.2)
ARGS["dro"] |= dict(precompute_ref=True)
ARGS["grpo"] |= dict(epochs=2)
for script in helpers.ONLINE:
    ARGS[script] |= dict(save_rollouts=True)
# the reference's log-probabilities are kept
ARGS["rpo"] |= dict(precompute_ref=True, reward_noise=0.5, keep_responses=0.75)
KILLS = range(EVERY + 1, 5)  # steps logged when the kill comes: after the first checkpoint, before the last


@pytest.fixture(scope="session")  # as `world` is: pytest-xdist may leave a module and come back
def unbroken(world):
    """The run of a script that nobody killed, made once; returns its folder. Each module that imports the fixture has
    its own, and the world is one."""

    @functools.cache
    def run(script):
        folder = world.path(f"runs/unbroken-{script}")
        if not (folder / "model").exists():
            world.run(script, **ARGS[script], run_dir=f"runs/unbroken-{script}").ok()
        return folder

    return run


def rows_written(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(world, script, run_dir, rows, delay):
    """Starts a run and kills it `delay` seconds after its `rows`-th row of metrics."""
    job = world.start(script, **ARGS[script], run_dir=run_dir)
    while rows_written(world.path(run_dir)) < rows:
        assert job.alive(0.002), job.wait().output
    assert job.alive(delay), "the run ended before the kill"
    job.kill()


def rollouts(run_dir) -> list[str]:
    """The lines of rollouts.jsonl; none of a script that writes none."""
    path = run_dir / "rollouts.jsonl"
    return path.read_text(encoding="utf-8").split("\n") if path.exists() else []


def assert_identical(run_dir, unbroken):
    """The same bytes of weights, the same rows of metrics and samples, each step written once and in
    order."""
    assert helpers.metrics(run_dir) == helpers.metrics(unbroken)
    training = [
        row["step"] for row in helpers.metrics(run_dir) if not any(key.startswith("eval/") for key in row)
    ]
    assert training == list(range(1, STEPS + 1))
    if (unbroken / "samples.jsonl").exists():
        assert helpers.samples(run_dir) == helpers.samples(unbroken)
    assert rollouts(run_dir) == rollouts(unbroken)
    assert helpers.exported(unbroken) and helpers.exported(run_dir) == helpers.exported(unbroken)


@pytest.mark.parametrize("script", helpers.SCRIPTS)
def test_killed_at_a_random_moment(world, unbroken, script):
    """SIGKILL at any moment, then --resume: bit for bit the run that was never killed; --keep checkpoints
    remain."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed of the kill: {seed}")
    rng = random.Random(seed)
    rows = rng.choice(KILLS)
    if script in helpers.ONLINE:
        rows += 1  # the evaluation of step 0
    delay = rng.uniform(0, 0.03)
    print(f"killed {delay:.3f} s after row {rows}")
    kill_at(world, script, "runs/killed-" + script, rows, delay)
    result = world.run(script, **ARGS[script], run_dir="runs/killed-" + script, resume=True).ok()
    print(result.output)
    killed = world.path("runs/killed-" + script)
    assert_identical(killed, unbroken(script))
    assert sorted(path.name for path in (killed / "checkpoints").glob("step-*")) == [
        "step-000006",
        "step-000008",
    ]


@pytest.mark.parametrize("when", ["half", "rename"])
def test_killed_in_a_checkpoint(world, unbroken, when):
    """A checkpoint half written, or not yet renamed, is passed over: the one before it is used."""
    run_dir = f"runs/saving-{when}"
    result = world.run(
        "sft", patch=functools.partial(helpers.die_in_second_save, when=when), **ARGS["sft"], run_dir=run_dir
    )
    assert result.codes == [-9]
    found = sorted(path.name for path in (world.path(run_dir) / "checkpoints").iterdir())
    assert found == ["part-000004", "step-000002"]
    world.run("sft", **ARGS["sft"], run_dir=run_dir, resume=True).ok()
    assert_identical(world.path(run_dir), unbroken("sft"))
    assert not list((world.path(run_dir) / "checkpoints").glob("part-*"))


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2)])
def test_other_number_of_ranks(world, before, after):
    """A checkpoint of 2 ranks goes on with 1, and the other way: policy, critic and both optimizers as if
    unbroken."""
    args = helpers.ARGS["ppo"] | dict(precision="fp64", save_every=1, eval_every=0, kl_target=0.1)
    whole = world.path("runs/whole")
    moved = f"runs/moved-{before}-{after}"
    if not whole.exists():
        world.run("ppo", **args | dict(steps=2, run_dir="runs/whole")).ok()
    world.run("ppo", before, **args | dict(steps=1, run_dir=moved)).ok()
    result = world.run("ppo", after, **args | dict(steps=2, run_dir=moved, resume=True)).ok()
    assert "resuming with other arguments" in result.output and "steps 1 -> 2" in result.output
    helpers.assert_same(world.path(moved), whole)


def test_nothing_to_resume(world, unbroken):
    """--resume in an empty folder is a run from the start."""
    world.run("sft", **ARGS["sft"], run_dir="runs/fresh", resume=True).ok()
    assert_identical(world.path("runs/fresh"), unbroken("sft"))


@pytest.mark.parametrize("script", helpers.SCRIPTS)
def test_finished_run_resumed(world, unbroken, script):
    """--resume of a run that had ended changes neither its weights nor its metrics."""
    run_dir = f"runs/again-{script}"
    shutil.copytree(unbroken(script), world.path(run_dir))
    world.run(script, **ARGS[script], run_dir=run_dir, resume=True).ok()
    assert helpers.exported(world.path(run_dir)) == helpers.exported(unbroken(script))
    assert helpers.metrics(world.path(run_dir)) == helpers.metrics(unbroken(script))
    assert rollouts(world.path(run_dir)) == rollouts(unbroken(script))


def test_every_step_of_a_resumed_run_is_in_its_rollouts_once(world, unbroken):
    """And without the flag a resumed run still cuts back what is there."""
    for script in helpers.ONLINE:
        steps = [json.loads(line)["step"] for line in rollouts(unbroken(script))[:-1]]
        assert steps == sorted(steps) and set(steps) == set(range(1, STEPS + 1))
        assert len(steps) == STEPS * ARGS[script]["batch_size"]


def test_killed_before_the_first_checkpoint(world, unbroken):
    """With no checkpoint yet, --resume starts anew and the rows of the first try are gone."""
    kill_at(world, "dvpo", "runs/early", 1, 0.0)
    assert not (world.path("runs/early") / "checkpoints").exists()
    world.run("dvpo", **ARGS["dvpo"], run_dir="runs/early", resume=True).ok()
    assert_identical(world.path("runs/early"), unbroken("dvpo"))


@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("metrics.jsonl", '{"step": 9, "sft/lo'),
        ("samples.jsonl", '{"step": 9, "prompt": [{"role": "user", "content": "soup"}'),
        ("samples.jsonl", '{"step": 3, "prompt": "soup", "response": "warm\u2028very"}\n'),
    ],
    ids=["torn", "torn after a brace", "line separator in the text"],
)
def test_torn_line_is_healed(world, unbroken, name, tail):
    """A last line that a crash cut off is dropped on --resume; a whole line stays, whatever is in its
    text."""
    run_dir = world.path("runs/torn")
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(unbroken("sft"), run_dir)
    before = (run_dir / name).read_text(encoding="utf-8")
    (run_dir / name).write_text(before + tail, encoding="utf-8")
    world.run("sft", **ARGS["sft"], run_dir="runs/torn", resume=True).ok()
    rows = helpers.metrics(run_dir), helpers.samples(run_dir)  # every line is JSON again
    assert rows[0][: len(helpers.metrics(unbroken("sft")))] == helpers.metrics(unbroken("sft"))
    lines = before.split("\n")[:-1] + [tail[:-1]] * tail.endswith("\n")
    assert sorted((run_dir / name).read_text(encoding="utf-8").split("\n")[:-1]) == sorted(lines)


def test_folder_in_use(world, unbroken):
    """A run folder that holds a run is neither mixed with another nor lost: one line says so; --overwrite
    replaces it."""
    kept = helpers.metrics(unbroken("sft"))
    args = ARGS["sft"] | dict(run_dir="runs/unbroken-sft")
    for processes in (0, 2):
        line = world.run("sft", processes, **args).error()
        assert "runs/unbroken-sft" in line and all(
            flag in line for flag in ("--resume", "--overwrite", "--run-dir")
        )
    assert helpers.metrics(unbroken("sft")) == kept
    world.run("sft", **args | dict(run_dir="runs/replaced", steps=2)).ok()
    world.run("sft", **args | dict(run_dir="runs/replaced", steps=1, overwrite=True)).ok()
    assert [row["step"] for row in helpers.metrics(world.path("runs/replaced"))] == [1, 1]
    assert [path.name for path in (world.path("runs/replaced") / "checkpoints").iterdir()] == ["step-000001"]


def test_overwriting_the_folder_of_the_model_one_starts_from(world):
    """--overwrite loses neither the model the new run starts from nor, by a typo in --dataset, the old run's
    numbers."""
    args = ARGS["sft"] | dict(run_dir="runs/onto", steps=1)
    world.run("sft", **args).ok()
    again = args | dict(model="runs/onto/model", overwrite=True)
    line = world.run("sft", **again | dict(dataset="typo.jsonl")).error()
    assert "typo.jsonl" in line and len(helpers.metrics(world.path("runs/onto"))) == 2
    before = helpers.exported(world.path("runs/onto"))
    world.run("sft", **again).ok()
    assert (
        len(helpers.metrics(world.path("runs/onto"))) == 2
        and helpers.exported(world.path("runs/onto")) != before
    )


@pytest.mark.parametrize("script", ["dvpo", "ppo"])
@pytest.mark.parametrize("kl_target", [0.0, 0.1])
def test_a_changed_beta_counts_unless_it_is_adaptive(world, script, kl_target):
    """`--resume --beta X`: a fixed beta is X from then on; an adaptive one goes on where it was."""
    args = helpers.ARGS[script] | dict(save_every=1, eval_every=0, kl_target=kl_target)
    run_dir = f"runs/beta-{script}-{kl_target}"
    world.run(script, **args | dict(steps=1, beta=0.2, run_dir=run_dir)).ok()
    world.run(script, **args | dict(steps=2, beta=0.7, run_dir=run_dir, resume=True)).ok()
    betas = [row["objective/beta"] for row in helpers.metrics(world.path(run_dir)) if "objective/beta" in row]
    assert betas[0] == 0.2
    if kl_target:
        assert betas[1] == pytest.approx(0.2, rel=0.01) and betas[1] != 0.2
    else:
        assert betas[1] == 0.7


def test_a_checkpoint_of_another_model_is_one_line(world):
    """Nothing of it is taken, and no traceback of the library's is shown."""
    args = helpers.ARGS["reward"] | dict(save_every=1, run_dir="runs/deeper")
    world.run("reward", **args | dict(steps=1, layers=1)).ok()
    line = world.run("reward", **args | dict(steps=2, layers=2, resume=True)).error()
    assert "runs/deeper/checkpoints/step-000001: --resume" in line


def test_a_resumed_run_needs_the_data_it_began_with(world):
    """Rows that were added, or changed, would put all rows in another order; the checkpoint stays."""
    rows = [json.loads(line) for line in world.path("scored.jsonl").read_text().splitlines()]
    args = helpers.ARGS["sft"] | dict(dataset=world.write("growing.jsonl", rows), eval_dataset="scored.jsonl")
    args |= dict(eval_split="train", run_dir="runs/growing", save_every=1)
    world.run("sft", **args | dict(steps=1)).ok()
    world.run("sft", **args | dict(steps=2, resume=True)).ok()
    for changed in ([*rows, rows[0]], [{**rows[0], "response": "the soup was bad ."}, *rows[1:]]):
        world.write("growing.jsonl", changed)
        line = world.run("sft", **args | dict(steps=3, resume=True)).error()
        assert "runs/growing: the data has changed since the run began" in line
    world.write("growing.jsonl", rows)
    world.run("sft", **args | dict(steps=3, resume=True)).ok()


def test_a_resumed_run_needs_the_columns_that_its_rewards_are_made_of(world):
    """The tokens are the same, and what an answer is compared with is not."""
    rows = [json.loads(line) for line in world.path("prompts.jsonl").read_text().splitlines()]
    world.write("asked.jsonl", [{**row, "answer": "soup"} for row in rows])
    args = helpers.ARGS["grpo"] | dict(dataset="asked.jsonl", run_dir="runs/asked", save_every=1)
    world.run("grpo", **args | dict(steps=1)).ok()
    world.write("asked.jsonl", [{**row, "answer": "ice"} for row in rows])
    line = world.run("grpo", **args | dict(steps=2, resume=True)).error()
    assert "runs/asked: the data has changed since the run began" in line
    world.write("asked.jsonl", [{**row, "answer": "soup"} for row in rows])
    world.run("grpo", **args | dict(steps=2, resume=True)).ok()
