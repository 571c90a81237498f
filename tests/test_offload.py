"""--offload-frozen: frozen models that wait on the host change nothing but the memory."""

import json
from types import SimpleNamespace

import helpers
import pytest
import torch
from torch.distributed.tensor import DTensor

from assets import reviews
from common import offload, sharding
from common.batches import run_micro_batches
from common.meter import state_bytes
from common.models import load_model
from common.tokenization import load_tokenizer

SEQUENCES = [([1, 9, 12, 20], [30, 31, 2]), ([1, 8, 5], [33, 2]), ([1, 7, 7, 21, 22], [35, 36, 37, 38, 2])]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_parked_model_has_no_bytes_and_comes_back_as_it_was(group, precision):
    args = SimpleNamespace(precision=precision, shard_size=0, gradient_checkpointing=False, lora_rank=0)
    tokenizer = load_tokenizer(reviews.folder("policy"))
    model, trained = (
        load_model("policy", reviews.folder("policy"), tokenizer, args, trained=t) for t in (False, True)
    )
    forward = lambda mb: model.response_logprobs(**mb)[0]
    before = run_micro_batches(forward, SEQUENCES, 2, 0, 5)
    whole = state_bytes([model, trained])
    assert (sharding.units(model) != []) == (precision == "bf16")

    def held():
        tensors = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    bytes_before = held()
    offload.park([trained])
    assert held() == bytes_before > 0 and not hasattr(model, "parked")
    offload.park([trained, model])
    assert held() == 0 and not hasattr(trained, "parked")
    assert state_bytes([model, trained]) == state_bytes([trained]) < whole
    for _ in range(2):
        assert run_micro_batches(forward, SEQUENCES, 2, 0, 5, model=model).equal(before)
        assert held() == 0
    with pytest.raises(ZeroDivisionError):
        run_micro_batches(lambda mb: 1 / 0, SEQUENCES, 2, 0, 5, model=model)
    assert held() == 0
    with torch.no_grad(), offload.on_device(model):
        assert held() == bytes_before


@pytest.fixture(scope="session")
def reward_model(world):
    world.run("reward", **helpers.ARGS["reward"], run_dir="runs/reward-to-park").ok()
    return "runs/reward-to-park/model"


@pytest.mark.parametrize(
    "script, processes, precision",
    [("dvpo", 0, "fp32"), ("dvpo", 2, "bf16"), ("ppo", 2, "bf16"), ("grpo", 2, "bf16"), ("remax", 0, "fp32")],
)
def test_a_run_is_the_same_bit_for_bit(world, reward_model, script, processes, precision):
    """Reward models in training and evaluation too; less of the state is on the device."""
    args = helpers.ARGS[script] | dict(precision=precision, eval_reward=(reward_model,))
    args |= {} if script == "dvpo" else dict(reward=reward_model)
    found = []
    state = []
    for parked in (False, True):
        run_dir = world.path(f"runs/parked-{script}-{processes}-{parked}")
        world.run(script, ranks=processes, **args, offload_frozen=parked, run_dir=str(run_dir)).ok()
        found.append((helpers.metrics(run_dir), helpers.samples(run_dir), helpers.exported(run_dir)))
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        state.append(next(row["memory/state_gb"] for row in lines if "memory/state_gb" in row))
    assert found[0] == found[1]
    assert state[1] < 0.97 * state[0]
