"""1, 2 and 4 processes, and any micro-batch size, train the same model on ragged data; frozen models stay as they were."""

import functools
import json
import os
import time
from pathlib import Path

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file

from common import distributed, sharding

VARIANTS = {
    "gvm_td": dict(
        normalise_values=True, context_pairs=2, context_length=8, source="preference", dataset="pairs.jsonl"
    ),
    "dvpo": dict(gvm="runs/context", advantage="q", missing_eos_penalty=1.0),
    "ppo": dict(reward="runs/judge/model", critic=""),
    "rpo": dict(length_normalise=True, keep_responses=0.75, reward_noise=0.5, precompute_ref=True),
    "dro": dict(shared_encoder=True, length_normalise=True),
    "kto": dict(length_normalise=True, threshold=0.5, dataset="scored.jsonl", undesirable_weight=2.0),
    "dpo": dict(length_normalise=True, label_smoothing=0.1),
    "grpo": dict(
        aggregation="dapo", scale_std=False, beta=0.0, clip_high=0.28, epochs=2, missing_eos_penalty=1.0
    ),
    "remax": dict(aggregation="grpo", epochs=2, missing_eos_penalty=1.0),
}


@pytest.fixture(scope="session")  # as `world` is: pytest-xdist may leave a module and come back
def alone(world):
    """The run of a script in one process, one micro-batch a step, made once; returns its folder."""

    @functools.cache
    def run(script):
        world.run(script, **helpers.ARGS[script], precision="fp64", run_dir=f"runs/alone-{script}").ok()
        return world.path(f"runs/alone-{script}")

    return run


CASES = [(script, processes, 1) for script in helpers.SCRIPTS for processes in (0, 4)]
# the others' variants are on 2 ranks
CASES += [(script, 2, 3) for script in helpers.SCRIPTS if script not in VARIANTS]


@pytest.mark.parametrize(("script", "processes", "micro"), CASES)
def test_same_training(world, alone, script, processes, micro):
    """Losses, gradient norms, samples and weights after three steps depend on neither ranks nor micro-batches."""
    run_dir = f"runs/{script}-{processes}-{micro}"
    args = helpers.ARGS[script] | dict(precision="fp64", micro_batch_size=micro, run_dir=run_dir)
    world.run(script, processes, **args).ok()
    helpers.assert_same(alone(script), world.path(run_dir))


@pytest.mark.parametrize("script", VARIANTS)
def test_same_training_of_variants(world, script):
    """The same for normalised values, context pairs, action values, a reward model as critic, mean log-probabilities."""
    if script == "ppo":
        world.run("reward", **helpers.ARGS["reward"] | dict(run_dir="runs/judge", steps=2)).ok()
    args = helpers.ARGS[script] | VARIANTS[script] | dict(precision="fp64")
    for processes, micro in ((0, 8), (2, 1)):
        world.run(
            script,
            processes,
            **args | dict(micro_batch_size=micro, run_dir=f"runs/variant-{script}-{processes}"),
        ).ok()
    # normalised values leave the bias no gradient but rounding, which the fold divides by a small deviation
    weights = 1e-9 if script == "gvm_td" else 1e-10
    helpers.assert_same(
        *(world.path(f"runs/variant-{script}-{processes}") for processes in (0, 2)), weights=weights
    )


def test_one_update_takes_its_own_logprobs_for_the_old_ones(world):
    """grpo.py with one update a rollout: as with a scoring pass before it (which a dropout, here of no adapters, calls for)."""
    args = helpers.ARGS["grpo"] | dict(
        precision="fp64", epochs=1, mini_batch_size=helpers.ARGS["grpo"]["batch_size"]
    )
    world.run("grpo", 2, **args | dict(micro_batch_size=2, run_dir="runs/one-update")).ok()
    world.run("grpo", **args | dict(lora_dropout=1e-9, run_dir="runs/scored")).ok()
    helpers.assert_same(
        *(world.path(f"runs/{name}") for name in ("one-update", "scored")), weights=1e-6, norms=1e-6
    )
    assert any(
        row["objective/kl"] > 1e-4
        for row in helpers.metrics(world.path("runs/one-update"))
        if "objective/kl" in row
    )


def test_hybrid_sharding_and_frozen_models(world, alone):
    """--shard-size 2 on 4 ranks trains as one rank; GVM and reference keep every bit, with no gradient and no optimizer."""
    args = helpers.ARGS["dvpo"] | dict(precision="fp64", shard_size=2, run_dir="runs/hybrid")
    world.run("dvpo", 4, functools.partial(helpers.watch_frozen, log="frozen"), **args).ok()
    helpers.assert_same(alone("dvpo"), world.path("runs/hybrid"))
    for rank in range(4):
        found = json.loads(world.path(f"frozen-{rank}").read_text())
        assert found == {"kinds": ["value", "policy"], "changed": [], "gradients": [], "optimized": []}


def count_exchanges(module, log):
    """At export, writes how often gradients were summed over the replicas, and of how many units."""
    all_reduce, export, calls = dist.all_reduce, module.export, []

    def counted(tensor, *args, group=None, **kwargs):
        calls.extend([1] * (group is not None and group.size() == 2))
        return all_reduce(tensor, *args, group=group, **kwargs)

    def written(model, *args, **kwargs):
        Path(f"{log}-{distributed.rank()}").write_text(json.dumps([len(calls), len(sharding.units(model))]))
        export(model, *args, **kwargs)

    dist.all_reduce, module.export = counted, written


@pytest.mark.parametrize("script, trained", [("dvpo", 1), ("ppo", 2), ("dro", 2)])
def test_replicas_exchange_gradients_once_an_optimizer_step(world, script, trained):
    """2 replicas of 2 shards, three micro-batches a step: the training of one process, one exchange a step and unit."""
    steps, batch = 2, dict(batch_size=9) | (dict(mini_batch_size=9) if script in helpers.ONLINE else {})
    args = helpers.ARGS[script] | batch | dict(steps=steps, precision="fp64")
    alone, split = f"runs/exchange-{script}-1", f"runs/exchange-{script}-4"
    world.run(script, **args | dict(micro_batch_size=9, run_dir=alone)).ok()
    patch = functools.partial(count_exchanges, log=f"exchanges-{script}")
    world.run(script, 4, patch, **args | dict(micro_batch_size=1, shard_size=2, run_dir=split)).ok()
    helpers.assert_same(world.path(alone), world.path(split))
    for rank in range(4):
        calls, units = json.loads(world.path(f"exchanges-{script}-{rank}").read_text())
        assert units > 2
        # and once where the trained policy is compared with itself when it is opened
        assert calls == (steps * trained + 1) * units, (calls, units)


def test_normalised_values_are_folded_into_the_exported_head(world):
    """--normalise-values: the exported head is the trained one, less the last batch's mean and over its deviation."""
    args = helpers.ARGS["gvm_td"] | dict(normalise_values=True, save_every=3, run_dir="runs/folded")
    world.run("gvm_td", **args).ok()
    checkpoint = world.path("runs/folded/checkpoints/step-000003")
    extra = json.loads((checkpoint / "state.json").read_text())
    assert abs(extra["value_std"] - 1) > 0.1 and extra["value_mean"]
    raw = {"model": {"model": {"score.weight": torch.zeros(1, 64), "score.bias": torch.zeros(1)}}}
    dcp.load(raw, checkpoint_id=checkpoint / "dcp", no_dist=True)
    weight, bias = raw["model"]["model"]["score.weight"], raw["model"]["model"]["score.bias"]
    exported = load_file(world.path("runs/folded/model/model.safetensors"))
    torch.testing.assert_close(exported["score.weight"], weight / extra["value_std"])
    torch.testing.assert_close(exported["score.bias"], (bias - extra["value_mean"]) / extra["value_std"])


def test_tied_weights_are_exported_once(world, alone):
    """An export holds the same tensors from 2 ranks as from 1."""
    world.run("sft", 2, **helpers.ARGS["sft"] | dict(precision="fp64", steps=1, run_dir="runs/tied")).ok()
    names = [
        set(safe_open(path / "model/model.safetensors", "pt").keys())
        for path in (alone("sft"), world.path("runs/tied"))
    ]
    assert names[0] == names[1]


def on_another_disk(module):
    """Rank 1 has a working folder of its own, as a node without shared storage."""
    from common import log

    log.SHARED_TRIES = 2
    if os.environ["RANK"] == "1":
        os.makedirs("other-node", exist_ok=True)
        os.chdir("other-node")


def test_nodes_without_shared_storage_are_one_line(world):
    """Each would keep its half of a checkpoint; the run ends at its start, and says why."""
    result = world.run("sft", 2, on_another_disk, steps=1, run_dir="runs/not-shared")
    assert all(result.codes), result.output
    assert "rank 1 does not see what rank 0 writes there" in result.output
    assert "Traceback" not in result.output
    assert not list(world.path("runs/not-shared").glob("checkpoints/*"))


def newest_is_hidden_from_rank_1(module):
    """As a network file system that is slow to show a new folder."""
    from common import checkpoints

    real = checkpoints.Path.glob

    def glob(path, pattern):
        found = sorted(real(path, pattern))
        late = os.environ["RANK"] == "1" and "state.json" in pattern
        return iter(found[:-1] if late else found)

    checkpoints.Path.glob = glob


def test_rank_0_chooses_the_checkpoint(world):
    """All ranks go on from the same one, though rank 1 does not list the newest yet."""
    constant = dict(lr_schedule="constant", warmup_steps=0)  # or it would depend on the number of steps
    args = helpers.ARGS["sft"] | constant | dict(save_every=1, keep=2, precision="fp64", eval_every=0)
    world.run("sft", **args | dict(steps=3, run_dir="runs/chosen-alone")).ok()
    world.run("sft", 2, **args | dict(steps=2, run_dir="runs/chosen")).ok()
    resumed = args | dict(steps=3, run_dir="runs/chosen", resume=True)
    world.run("sft", 2, newest_is_hidden_from_rank_1, **resumed).ok()
    steps = [row["step"] for row in helpers.metrics(world.path("runs/chosen")) if "sft/loss" in row]
    assert steps == [1, 2, 3]
    a, b = (helpers.metrics(world.path(f"runs/{name}"))[-1] for name in ("chosen", "chosen-alone"))
    assert a == pytest.approx(b, rel=1e-6)


def slow_download(module):
    """Rank 0 gets its weights after three times the time-out."""
    from common import models

    read_weights = models.read_weights

    def slowly(*args, **kwargs):
        time.sleep(9)
        return read_weights(*args, **kwargs)

    models.read_weights = slowly


def test_a_download_may_take_longer_than_the_time_out(world):
    args = helpers.ARGS["sft"] | dict(
        steps=1, eval_every=0, run_dir="runs/slow-download", timeout_minutes=0.05
    )
    world.run("sft", 2, slow_download, **args).ok()
