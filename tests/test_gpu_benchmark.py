"""benchmarks/gpu.py: every piece's dry run on a CPU, what it writes, the limit, the page, and what it refuses."""

import json
import math
import os
import sys
from types import SimpleNamespace

import helpers
import pytest
import torch

sys.path.append(str(helpers.ROOT / "benchmarks"))
import gpu

ABOUT = ("piece", "device", "torch", "transformers", "command", "commit", "date", "seconds", "complete")
# By piece the tables, and columns that each row has.
TABLES = {
    "correct": {
        "first update": ("policy/ratio", "policy/approx_kl", "rollout/mismatch"),
        "sampler": ("tolerance", "check_sampler", "mean", "p99", "no cache"),
        "against float64 on the CPU": ("logprobs: mean off", "values: most off", "gradient norm"),
    },
    "update": {"update": ("checkpointing", "s", "tokens/s", "model TFLOP/s", "MFU", "peak GB")},
    "decode": {
        "memory": ("copy GB/s",),
        "decode": ("engine", "batch", "tokens/s", "bound, tokens/s", "share of the bound"),
    },
    "steps": {
        "steps": ("script", "s", "rollout s", "rollout GB", "rollout planned GB", "update planned GB"),
    },
    "learn": {
        "learn": ("script", "steps", "eval/reward, first", "eval/reward, last"),
        "curve": ("script", "step", "objective/score", "rollout/length"),
    },
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The results of `all --dry-run`."""
    folder = tmp_path_factory.mktemp("gpu")
    before = dict(os.environ)  # a dry run hides the GPU from its process
    gpu.main(["all", "--dry-run", "--out", str(folder / "out"), "--work", str(folder / "work")])
    os.environ.clear()
    os.environ.update(before)
    return folder / "out"


@pytest.fixture
def hidden(monkeypatch):
    """A test that makes a dry run of its own leaves the environment as it was."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def read(out, piece: str) -> dict:
    return json.loads((out / f"{piece}.json").read_text())


@pytest.mark.parametrize("piece", gpu.PIECES)
def test_a_dry_run_writes_what_a_run_on_a_gpu_would(out, piece):
    found = read(out, piece)
    assert found["dry_run"] is True and found["complete"] is True and found["notes"] == []
    assert all(found[key] for key in ABOUT)
    assert found["command"].startswith("python benchmarks/gpu.py all --dry-run")
    for table, columns in TABLES[piece].items():
        assert found["tables"][table]
        for row in found["tables"][table]:
            assert set(columns) <= set(row), (table, set(columns) - set(row))
    for rows in found["tables"].values():
        for row in rows:
            numbers = [cell for cell in row.values() if isinstance(cell, float | int)]
            assert all(math.isfinite(number) for number in numbers), row


def test_the_numbers_of_one_device_agree_with_themselves(out):
    """float32 is near float64, bf16 farther; a ratio before the first update is 1."""
    tables = read(out, "correct")["tables"]
    exact, single, half = tables["against float64 on the CPU"]
    assert exact["logprobs: most off"] == 0
    assert 0 < single["logprobs: most off"] < 1e-5 < half["logprobs: most off"] < 0.1
    assert 0 < single["values: most off"] < 1e-5 < half["values: most off"] < 0.1
    assert single["gradient norm: relative error"] < 1e-4 and half["gradient norm: relative error"] < 0.1
    assert exact["mean logprob after"] > exact["mean logprob"]  # the step goes up
    (first,) = tables["first update"]
    assert first["policy/ratio"] == pytest.approx(1, abs=1e-5) and first["policy/approx_kl"] < 1e-6
    for row in tables["sampler"]:
        assert row["check_sampler"] == "agrees" and row["mean"] < row["tolerance"] and row["no cache"] > 0.01


def test_every_script_has_its_steps_and_its_curve(out):
    assert {row["script"] for row in read(out, "steps")["tables"]["steps"]} == set(gpu.SCRIPTS)
    found = read(out, "learn")
    assert set(found["curves"]) == set(gpu.SCRIPTS)
    for lines in found["curves"].values():
        assert [line["step"] for line in lines if "time/step_s" in line] == [1, 2]
    assert all(row["steps"] == row["of"] == 2 for row in found["tables"]["learn"])


def test_vllm_is_measured_or_missing(out):
    tables = read(out, "decode")["tables"]
    engines = {row["engine"] for row in tables["decode"]}
    assert engines == {"torch", "vllm"} or "vllm" in tables["vllm"][0]


def test_the_page_shows_every_table(out, capsys):
    gpu.main(["page", "--out", str(out)])
    text = (out / "gpu.md").read_text()
    assert text in capsys.readouterr().out
    assert "numbers mean nothing" in text
    for piece, tables in TABLES.items():
        assert f"## {piece}" in text
        for table in tables:
            assert f"### {piece}: {table}" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_a_table_has_all_columns_and_no_broken_cells():
    text = gpu.table([{"a": 1234.5, "b": None}, {"a": 0.000123456, "c": "x|y"}])
    lines = text.splitlines()
    assert lines == ["| a | b | c |", "| --- | --- | --- |", "| 1,234 | - | - |", "| 0.0001235 | - | x\\|y |"]


def test_the_bytes_of_a_token_have_their_closed_form():
    """The weights but for the input embedding, and keys and values; in bf16 two bytes each."""
    head, inside = torch.nn.Linear(8, 10, bias=False), torch.nn.Embedding(10, 8)
    config = SimpleNamespace(
        tie_word_embeddings=False,
        hidden_size=8,
        num_attention_heads=2,
        num_hidden_layers=3,
        num_key_value_heads=1,
    )
    policy = SimpleNamespace(
        config=config,
        compute_dtype=torch.bfloat16,
        parameters=lambda: [*head.parameters(), *inside.parameters()],
        get_input_embeddings=lambda: inside,
    )
    assert gpu.bytes_per_step(policy, 5, 7) == 2 * (80 + 5 * 7 * 3 * 2 * 4)
    config.tie_word_embeddings = True  # the output layer is the embedding, and is read
    assert gpu.bytes_per_step(policy, 0, 0) == 2 * 160


def test_the_limit_stops_a_piece_that_keeps_what_it_has(tmp_path, hidden, monkeypatch):
    def endless(record):
        record.row("numbers", {"one": 1.0})
        while True:
            pass

    monkeypatch.setitem(gpu.PIECES, "update", gpu.Piece(endless, 1, "never ends"))
    gpu.main(["update", "--dry-run", "--limit", "0.2", "--out", str(tmp_path), "--work", str(tmp_path)])
    found = read(tmp_path, "update")
    assert found["complete"] is False and found["tables"] == {"numbers": [{"one": 1.0}]}
    assert "by --limit" in found["notes"][0] and found["seconds"] < 5


def test_learn_stops_in_time_and_goes_on(tmp_path, hidden, monkeypatch):
    """Where the time is over after a step, its checkpoint is written; the same command makes the others."""
    words = ["learn", "--dry-run", "--only", "grpo", "--steps", "3"]
    words += ["--out", str(tmp_path), "--work", str(tmp_path)]
    monkeypatch.setattr(gpu, "SAVING", 1000.0)
    gpu.main(words)
    found = read(tmp_path, "learn")
    assert found["tables"]["learn"][0]["steps"] == 1 and "goes on" in found["notes"][0]
    monkeypatch.setattr(gpu, "SAVING", 0.0)
    gpu.main(words)
    found = read(tmp_path, "learn")
    steps = [line["step"] for line in found["curves"]["grpo"] if "time/step_s" in line]
    assert steps == [1, 2, 3] and found["notes"] == []


def test_what_does_not_fit_is_a_row(tmp_path, hidden, monkeypatch):
    """Out of memory in one setting ends neither the piece nor the other settings."""
    real = gpu.one_update

    def scarce(policy, optimizer, sequences, micro, pad, lr):
        if micro == 4:
            raise torch.OutOfMemoryError("no more")
        return real(policy, optimizer, sequences, micro, pad, lr)

    monkeypatch.setattr(gpu, "one_update", scarce)
    gpu.main(["update", "--dry-run", "--model", "1B", "--out", str(tmp_path), "--work", str(tmp_path)])
    found = read(tmp_path, "update")
    assert found["complete"] is True
    rows = [(row["checkpointing"], row["micro-batch"], row.get("error")) for row in found["tables"]["update"]]
    assert rows == [
        (True, 2, None),
        (True, 4, "out of memory"),
        (False, 2, None),
        (False, 4, "out of memory"),
    ]


def test_prompts_are_as_long_as_asked(tmp_path, tokenizer):
    gpu.write_prompts(tmp_path / "p.jsonl", gpu.speed.make_tokenizer(512), 5, 12)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 5
    assert all(len(row["prompt"].split()) == 11 for row in rows)  # and the bos


@pytest.mark.parametrize(
    "words, said",
    [
        (["nothing"], "no such piece"),
        (["all"], "--dry-run"),
        (["update", "--model", "nowhere"], "--model nowhere"),
        (["update", "--nothing", "1"], "takes no --nothing"),
        (["update", "--limit", "0"], "--limit"),
        (["steps", "--only", "sft"], "--only sft"),
        (["learn"], "needs --model"),
        (["learn", "--model", "0.5B"], "needs --model"),
        (["learn", "--model", "assets/policy"], "needs --prompts"),
        (["learn", "--model", "assets/policy", "--prompts", "gone.jsonl", "--reward", "a:b"], "gone.jsonl"),
        (["page"], "no results"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(helpers.ROOT)
    with pytest.raises(SystemExit) as stopped:
        gpu.main([*words, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    message = str(stopped.value)
    assert message.startswith("error: ") and said in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_the_list_names_every_piece(capsys):
    gpu.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu.PIECES)
