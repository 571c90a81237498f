"""What a run folder may have suffered, and what one from elsewhere may hold: a damaged checkpoint is set aside and the one
before it is used, a damaged log is healed, a program is not run, and what cannot be right is not written."""

import errno
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import helpers
import pytest
import torch
from test_resume import ARGS, assert_identical
from test_resume import unbroken as unbroken  # a fixture

from common import checkpoints, durable


class Evil:
    """A pickle of it makes a file when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


# --- checkpoints


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def add(path):
    path.with_name("stray").write_text("x")


def no_table(path):
    path.write_text("7")


DAMAGES = [
    (flip_a_bit, "dcp/__0_0.distcp"),
    (halve, "dcp/__0_0.distcp"),
    (empty, "dcp/__0_0.distcp"),
    (os.unlink, "dcp/__0_0.distcp"),
    (add, "dcp/__0_0.distcp"),
    (flip_a_bit, "dcp/.metadata"),
    (os.unlink, "dcp/.metadata"),
    (flip_a_bit, "rng-0-of-1.pt"),
    (os.unlink, "rng-0-of-1.pt"),
    (flip_a_bit, "state.json"),
    (empty, "state.json"),
    (os.unlink, "state.json"),
    (empty, "checksums.json"),
    (no_table, "checksums.json"),
    (os.unlink, "checksums.json"),
]


@pytest.mark.parametrize("damage, name", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    unbroken, group, tmp_path, capsys, damage, name
):
    shutil.copytree(unbroken("sft") / "checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints/step-000008" / name)
    assert checkpoints.newest_whole(tmp_path) == tmp_path / "checkpoints/step-000006"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "damaged-step-000008",
        "step-000006",
    ]
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "step-000008: " in line
    damage(tmp_path / "checkpoints/step-000006" / name)
    with pytest.raises(SystemExit, match="no checkpoint is whole; --overwrite begins anew"):
        checkpoints.newest_whole(tmp_path)


def test_a_file_that_the_disk_does_not_give_back_is_damaged(tmp_path):
    """A read that fails is no traceback."""
    (tmp_path / "checksums.json").write_text(json.dumps({"a": durable.checksum(__file__)}))
    (tmp_path / "a").mkdir()  # to open it is an OSError, as to read a bad block is
    found = durable.checksums(tmp_path, ["a"])
    assert found == {"a": "unreadable: Is a directory"}
    assert durable.damage(tmp_path, found) == "a is damaged"


def late_listing(module):
    """Rank 1 sees in a folder only what it wrote itself, as on a network file system that is late."""
    from common import distributed

    files = durable.files

    def seen(folder):
        names = files(folder)
        return (
            names
            if distributed.rank() == 0
            else [name for name in names if "__1_" in name or "rng-1" in name]
        )

    durable.files = seen


def test_a_checkpoint_is_whole_where_a_rank_sees_the_others_files_late(world):
    args = helpers.ARGS["sft"] | dict(steps=2, save_every=2, run_dir="runs/late")
    world.run("sft", 2, late_listing, **args).ok()
    folder = world.path("runs/late/checkpoints/step-000002")
    assert durable.damage(folder, durable.checksums(folder)) == ""
    assert {checkpoints._writer(name) for name in durable.files(folder)} == {0, 1}
    result = world.run("sft", 2, late_listing, **args | dict(steps=3, resume=True)).ok()
    assert "set aside" not in result.output


def test_what_a_kill_left_goes_with_the_next_checkpoint(world):
    """Whatever its step: a run that saves by the clock never writes that one again."""
    args = helpers.ARGS["sft"] | dict(steps=2, save_every=1, run_dir="runs/left")
    world.run("sft", **args).ok()
    folder = world.path("runs/left/checkpoints")
    for name in ("part-000007", "part-removed-step-000001"):
        (folder / name).mkdir()
        (folder / name / "state.json").write_text("{}")
    world.run("sft", **args | dict(steps=3, resume=True)).ok()
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_run_goes_on_from_the_one_before(world, unbroken, ranks):
    run_dir = f"runs/damaged-{ranks}"
    shutil.copytree(unbroken("sft"), world.path(run_dir))
    flip_a_bit(world.path(run_dir) / "checkpoints/step-000008/dcp/__0_0.distcp")
    result = world.run("sft", ranks, **ARGS["sft"], run_dir=run_dir, resume=True).ok()
    assert result.output.count("is set aside as damaged-step-000008") == 1
    if ranks == 0:
        assert_identical(world.path(run_dir), unbroken("sft"))


def checksums_again(folder):
    """As one who can write there would."""
    (folder / "checksums.json").write_text(json.dumps(durable.checksums(folder)))


def test_a_program_in_a_checkpoint_is_not_run(world, unbroken):
    """Neither in torch's index nor in what is no tensor, however right the checksums are."""
    run_dir = world.path("runs/evil")
    shutil.copytree(unbroken("sft"), run_dir)
    evil = Evil(run_dir / "owned")
    folder = run_dir / "checkpoints/step-000008"
    (folder / "dcp/.metadata").write_bytes(pickle.dumps(evil))
    checksums_again(folder)
    error = world.run("sft", **ARGS["sft"], run_dir="runs/evil", resume=True).error()
    assert "posix.mkdir, which no checkpoint holds" in error
    assert not (run_dir / "owned").exists()

    for text in (b"", b"x", pickle.dumps([1])[:-1]):  # no pickle at all
        (folder / "dcp/.metadata").write_bytes(text)
        checksums_again(folder)
        error = world.run("sft", **ARGS["sft"], run_dir="runs/evil", resume=True).error()
        assert "it is no checkpoint" in error

    value = io.BytesIO()
    torch.save(evil, value)
    value.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        durable.Planner().load_bytes(None, value)
    assert not (run_dir / "owned").exists()


def test_the_index_names_nothing_else():
    for name in ("eval", "getattr", "__import__"):
        with pytest.raises(pickle.UnpicklingError):
            durable.IndexUnpickler(io.BytesIO()).find_class("builtins", name)
    for name in ("load", "hub", "serialization"):
        with pytest.raises(pickle.UnpicklingError):
            durable.IndexUnpickler(io.BytesIO()).find_class("torch", name)


def test_pruning_leaves_no_half_folder_under_its_name(tmp_path, monkeypatch):
    """A kill while a folder is removed: it is not called step-N any more."""
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    removed = []
    monkeypatch.setattr(durable.shutil, "rmtree", lambda path, **_: removed.append(path))
    durable.remove(folder)
    assert not folder.exists()
    assert all(path.name.startswith("part-") for path in removed)
    folder.mkdir()
    durable.remove(folder)  # what is left of the first one, as of a file that is open on NFS, is no obstacle
    assert not folder.exists() and len(list(tmp_path.glob("part-removed-step-000001*"))) == 2


# --- weights that are not finite


@pytest.mark.parametrize("save_every", [0, 1])
def test_weights_that_are_not_finite_are_not_written(world, save_every):
    run_dir = f"runs/not-finite-{save_every}"
    args = helpers.ARGS["reward"] | dict(steps=1, save_every=save_every, eval_every=0, run_dir=run_dir)
    error = world.run("reward", patch=inf_weight, **args).error()
    what = "checkpoints/step-000001, model," if save_every else "model"
    assert f"{run_dir}/{what} is not written: its weight " in error
    assert not list(world.path(run_dir).glob("**/step-*")) and not (world.path(run_dir) / "model").exists()


def inf_weight(module):
    """The last optimizer step leaves a weight of inf, as a step of an infinite rate does."""
    optimizer_step = module.optimizer_step

    def step(model, *rest):
        found = optimizer_step(model, *rest)
        weight = next(model.parameters()).data
        (weight.to_local() if hasattr(weight, "to_local") else weight).view(-1)[0] = float("inf")
        return found

    module.optimizer_step = step


# --- the rest of the folder


def test_logs_with_holes_are_healed(world, unbroken):
    """Blank lines, NULs and a torn middle, as a power cut leaves them, are dropped with a note."""
    run_dir = world.path("runs/holes")
    shutil.copytree(unbroken("sft"), run_dir)
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().split("\n")
    lines[1:1] = [
        "",
        "\0" * 40,
        '{"step": 2, "sft/l',
        "[1]",
        '{"loss": 1}',
        '{"step": "two"}',
        '{"step": null}',
    ]
    file.write_text("\n".join(lines))
    shutil.rmtree(run_dir / "checkpoints/step-000008")
    result = world.run("sft", **ARGS["sft"], run_dir="runs/holes", resume=True).ok()
    assert "metrics.jsonl: dropped 7 damaged lines" in result.output
    assert_identical(run_dir, unbroken("sft"))


def test_another_scripts_folder_is_refused(world, unbroken):
    written = json.loads((unbroken("sft") / "args.json").read_text())
    assert written["script"] == "sft.py"
    assert written["versions"]["torch"] == torch.__version__
    shutil.copytree(unbroken("sft"), world.path("runs/others"))
    error = world.run("rpo", **ARGS["rpo"], run_dir="runs/others", resume=True).error()
    assert "holds a run of sft.py" in error


def test_other_versions_are_said_and_a_damaged_args_json_is_one_line(world, unbroken):
    run_dir = world.path("runs/versions")
    shutil.copytree(unbroken("sft"), run_dir)
    written = json.loads((run_dir / "args.json").read_text())
    written["versions"]["torch"] = "1.0"
    (run_dir / "args.json").write_text(json.dumps(written))
    result = world.run("sft", **ARGS["sft"], run_dir="runs/versions", resume=True).ok()
    assert f"resuming with other versions: torch 1.0 -> {torch.__version__}" in result.output
    (run_dir / "args.json").write_text(json.dumps(written))
    for name in ("data.json", "args.json"):  # in this order: the arguments are compared first
        whole = (run_dir / name).read_text()
        for text in (whole[: len(whole) // 2], "[]", "3"):
            (run_dir / name).write_text(text)
            error = world.run("sft", **ARGS["sft"], run_dir="runs/versions", resume=True).error()
            assert f"{name} is damaged" in error
        (run_dir / name).write_text(whole)


def test_fewer_steps_than_the_checkpoint_has(world, unbroken):
    shutil.copytree(unbroken("sft"), world.path("runs/fewer"))
    result = world.run("sft", **ARGS["sft"] | dict(steps=3), run_dir="runs/fewer", resume=True).ok()
    assert "--steps 3, but the checkpoint is of step 8" in result.output


# --- a full disk


def full_after_the_start(module):
    """The logs lie on a disk without room."""
    start = module.Run.start

    def started(run, *rest):
        start(run, *rest)
        (run.dir / "metrics.jsonl").unlink(missing_ok=True)
        (run.dir / "metrics.jsonl").symlink_to("/dev/full")

    module.Run.start = started


def full_in_the_checkpoint(module):
    """The checkpoint does not fit."""
    from common import checkpoints

    def save(states, *, checkpoint_id):
        raise checkpoints.dcp.api.CheckpointException(
            "write", {0: (OSError(errno.ENOSPC, "No space left on device"), None)}
        )

    checkpoints.dcp.save = save


def full_at_the_random_state(module):
    """What does not fit is the small file beside the weights."""
    from common import checkpoints

    checkpoints._rng_file = lambda _: Path("/dev/full")


@pytest.mark.parametrize("patch", [full_after_the_start, full_in_the_checkpoint, full_at_the_random_state])
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_full_disk_is_one_line(world, patch, ranks):
    run_dir = f"runs/full-{patch.__name__}-{ranks}"
    error = world.run("sft", ranks, patch, **ARGS["sft"], run_dir=run_dir).error()
    assert error == f"error: no space left on {run_dir}; what was saved before is whole"


def test_other_errors_are_not_taken_for_a_full_disk():
    assert not durable.disk_full(ValueError("x"))
    assert not durable.disk_full(OSError(errno.ENOENT, "no such file"))
    try:
        try:
            raise OSError(errno.EDQUOT, "over quota")
        except OSError as error:
            raise RuntimeError("cannot write") from error
    except RuntimeError as error:
        assert durable.disk_full(error)
