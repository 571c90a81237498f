"""paper/difficulty.py: prompts chosen by V(s_1), and how many of GRPO's groups have no spread."""

import importlib
import json
import math
import types

import pytest
import torch

from common.models import load_model
from common.pretrained import resolve
from common.tokenization import encode_prompt, load_tokenizer
from common.value_heads import response_values
from paper import difficulty
from tools.jobs import Jobs

TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def answers(prompt, numbers, **more):
    return [{"prompt": prompt, "response": f"answer {i}", "reward": r} | more for i, r in enumerate(numbers)]


def test_what_is_chosen_and_what_is_judged():
    """The first half of a prompt's answers may choose, the other half alone is judged."""
    prompts = [
        {"value": 0.9, "rewards": [1, 0, 1, 1]},  # the pilot says 1/2, its group has no spread
        {"value": 0.6, "rewards": [1, 1, 0, 1]},
        {"value": 0.1, "rewards": [0, 0, 0, 0]},
        {"value": 0.3, "rewards": [1, 0, 1, 0]},
    ]
    assert difficulty.chosen(prompts, "any", 0.5) == prompts
    assert difficulty.chosen(prompts, "value", 0.5) == [prompts[1], prompts[3]]
    assert difficulty.chosen(prompts, "pilot", 0.5) == [prompts[0], prompts[3]]
    flat = {
        choice: difficulty.flat_share(difficulty.chosen(prompts, choice, 0.5))
        for choice in difficulty.CHOICES
    }
    assert flat == {"any": 0.5, "value": 0.0, "pilot": 0.5}
    assert difficulty.correlation(
        [{"value": v, "rewards": [v, v]} for v in (0.0, 0.5, 1.0)]
    ) == pytest.approx(1)
    assert math.isnan(difficulty.correlation([{"value": 0.3, "rewards": [1, 0]}] * 3))

    table = difficulty.report([prompts, prompts], 0.5)
    assert "| any | 0 | 0.500 ± 0.000 | 0.500 ± 0.000 |" in table  # of the second halves
    assert "| V(s_1) nearest to 1/2 | 0 | 0.000 ± 0.000 | 0.500 ± 0.000 |" in table
    assert "| the mean of 2 answers nearest to 1/2 | 2 | 0.500 ± 0.000 | 0.750 ± 0.000 |" in table
    assert "value against any: **holds** (+0.5 ± 0, 2 seeds)" in table
    assert "pilot against any: not separated (+0 ± 0, 2 seeds)" in table


def test_data(tmp_path, capsys):
    """Split by prompt, another split for another seed; a prompt that lacks an answer is left out and counted."""
    rows = [row for i in range(10) for row in answers(f"q{i}", [1, 0], rewards={"other": 0.0}, tools=TOOLS)]
    rows[3]["response"] = ""
    file = write(tmp_path / "scored.jsonl", rows)
    splits = []
    for seed in (0, 1):
        args = types.SimpleNamespace(
            scored=file, reward=None, run_dir=tmp_path, data_seed=seed, test_share=0.3
        )
        difficulty.write_data(args)
        parts = {}
        for part in ("train", "test"):
            lines = (tmp_path / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
            parts[part] = {json.loads(line)["prompt"] for line in lines}
            assert len(lines) == 2 * len(parts[part])
            assert all(json.loads(line)["tools"] == TOOLS for line in lines)  # the template reads them
        assert len(parts["test"]) == 3
        assert parts["train"] | parts["test"] == {f"q{i}" for i in range(10)} - {"q1"}
        splits.append(parts["test"])
    assert splits[0] != splits[1]
    assert "1 of 10 prompts have fewer than 2 answers: left out" in capsys.readouterr().out
    assert {row["reward"] for row in difficulty.read_answers(file, "other")} == {0.0}


@pytest.mark.parametrize(
    ("rows", "reward", "said"),
    [
        (answers("q", [1, 0.5]), None, "row 2: its reward is 0.5; it must be 0 or 1"),
        (answers("q", [1, 0]), "other", "row 1: no 'other' in 'rewards'"),
        (answers("q", [1]) + answers("r", [0]), None, "one answer to each prompt; give two at least"),
    ],
)
def test_bad_answers(tmp_path, rows, reward, said):
    with pytest.raises(SystemExit, match=rf"^error: .*scored\.jsonl.*{said}$"):
        difficulty.read_answers(write(tmp_path / "scored.jsonl", rows), reward)


def test_the_value_is_that_of_the_prompt(tmp_path, group):
    """V(s_1) of the model itself on the prompt alone, in the unit of the rewards."""
    prompts = ["please describe the soup", "please describe the rice and say more"]
    rows = [row for prompt in prompts for row in answers(prompt, [1, 0])]
    for row in rows:
        row["response"] = "the soup was good"
    file = write(tmp_path / "test.jsonl", rows)
    args = types.SimpleNamespace(
        model="reviews",
        scored=file,
        max_prompt_length=32,
        max_response_length=8,
        precision="auto",
        shard_size=0,
        run_dir=tmp_path,
    )
    difficulty.measure(args)
    found = json.loads((tmp_path / "difficulty.json").read_text())
    assert [each["rewards"] for each in found] == [[1.0, 0.0]] * 2

    folder = resolve("reviews", "value")
    tokenizer = load_tokenizer(folder, {})
    options = types.SimpleNamespace(precision="auto", shard_size=0, lora_rank=0)
    gvm = load_model("value", folder, tokenizer, options, trained=False, longest=64)
    for prompt, each in zip(prompts, found, strict=True):
        ids = encode_prompt(tokenizer, prompt)
        mb = {
            "input_ids": torch.tensor([[*ids, 5]]),
            "prompt_lengths": torch.tensor([len(ids)]),
            "response_mask": torch.ones(1, 1, dtype=torch.bool),
        }
        value = response_values(gvm, **mb)[0, 0].item()
        expected = value * gvm.config.return_std + gvm.config.return_mean
        assert each["value"] == pytest.approx(expected, abs=1e-4)


def test_commands(tmp_path, monkeypatch):
    """gvm_td.py accepts the command of the recipe; what is trained on and judged are two parts."""
    args = types.SimpleNamespace(
        model="reviews",
        layers=2,
        scored=tmp_path / "s.jsonl",
        reward="on_topic",
        test_share=0.5,
        max_prompt_length=64,
        max_response_length=8,
        gvm_flags="--lr 1e-4 --batch-size 32",
    )
    jobs = Jobs(tmp_path, difficulty.commands(args), [(0, "values")], set())
    assert [job.name for job in jobs.order] == ["data", "gvm", "values"]
    name, *flags = jobs.words(jobs.order[1])
    script = importlib.import_module(name.removesuffix(".py"))
    parsed = script.parse(script.Args, script.REVIEWS, flags)
    assert (parsed.source, parsed.layers, parsed.dataset) == (
        "scores",
        2,
        f"{tmp_path}/seed0/data/train.jsonl",
    )
