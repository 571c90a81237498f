"""benchmarks/speed.py: the order of the data, the model that ends responses where their prompts say, the
table, one real pair."""

import json
import sys

import helpers
import pytest
import torch
from transformers import AutoModelForCausalLM

from common import batches, data, tokenization
from common.tokenization import load_tokenizer

sys.path.append(str(helpers.ROOT / "benchmarks"))
import speed

SHAPE = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
LIMIT = 12


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return speed.make_models(tmp_path_factory.mktemp("models"), SHAPE, LIMIT)


def a_run(at, lengths=(), prompt=10, **more):
    """A record as speed_side.py writes it: the ends of steps, one rollout of half a second before each."""
    steps = [dict(at=t, cpu=t / 2, metrics={"sft/loss": 1.0}) for t in at]
    rollouts = [dict(at=t - 0.1, seconds=0.5, lengths=list(lengths)) for t in at] if lengths else []
    return dict(steps=steps, rollouts=rollouts, peak_mb=100.0) | more


def test_a_run_in_numbers():
    """The first step is left out; tokens/s of the update count the whole step but the rollout."""
    work = dict(epochs=2, prompt_tokens=20, tokens=90)
    found = speed.summary(a_run([5, 7, 9, 14], (4, 8)), work)
    assert found["seconds"] == 2 and found["cpu_seconds"] == 1 and found["length"] == 6
    assert found["rollout_tokens_s"] == 12 / 0.5
    assert found["update_tokens_s"] == 2 * (12 + 20) / (2 - 0.5)
    assert speed.summary(a_run([5, 7, 9, 14]), work)["update_tokens_s"] == 90 / 2


def test_ratios_are_of_pairs():
    """The median of the pairs' ratios, not the ratio of medians: a machine that slows down hits both sides of
    a pair."""

    def numbers(seconds):
        return {"seconds": seconds, "cpu_seconds": seconds / 2, "peak_mb": 50.0}

    times = [(1, 2), (10, 20), (30, 20)]
    row = speed.compared([{"ours": numbers(ours), "trl": numbers(theirs)} for ours, theirs in times])
    assert row["ratio_seconds"] == [0.5, 0.5, 1.5] and row["ours_seconds"] == 10 and row["trl_seconds"] == 20
    rows = [dict(name="sft", losses=[1.25, 1.25], ours_update_tokens_s=9, trl_update_tokens_s=8, **row)]
    text = speed.table(rows)
    assert "busy" not in text and "a CPU for 50% of its time" in speed.table(rows, cpu=True)
    assert (
        "| sft | 10 / 20 | 0.50 (0.50-1.50) | - | 9 / 8 | 50 / 50 | 1.00 (1.00-1.00) | 1.25 / 1.25 |" in text
    )


def test_a_row_whose_losses_differ_is_refused():
    assert speed.disagreement(1.0, 1.0005, 1e-3) == ""
    assert speed.disagreement(-2.0, -2.001, 1e-3) == ""
    why = speed.disagreement(1.23, 1.31, 1e-3)
    assert why == "not comparable: losses 1.23 and 1.31"
    assert speed.disagreement(float("nan"), float("nan"), 1e-3)
    assert "| dpo | not comparable: losses 1.23 and 1.31 |" in speed.table([dict(name="dpo", refused=why)])


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_trl_gets_the_rows_in_the_order_ours_are_drawn(algorithm, tmp_path, paths):
    """Through the functions that the scripts call."""
    size = {"prompt": 5, "response": LIMIT, "batch": 4, "micro": 2}
    kind = "sft"
    if algorithm == "grpo":
        size["group"] = 2
        kind = "prompts"
    a_step = speed.rows_per_step(size)
    rows = speed.make_rows(algorithm, size, 3, SHAPE["vocab_size"], LIMIT)
    speed.write_rows(tmp_path / "rows.jsonl", rows)
    read = data.read_rows(str(tmp_path / "rows.jsonl"), kind)
    if kind == "prompts":
        read.sort(key=lambda row: data.prompt_hash(row["prompt"], 1))
    drawn = []
    for step in range(3):
        drawn += [read[i]["prompt"] for i in batches.batch_indices(len(read), a_step, step, 0)]
    assert [row["prompt"] for row in speed.in_drawn_order(rows, algorithm, a_step)] == drawn
    assert drawn != [row["prompt"] for row in rows] and len(set(drawn)) == len(rows)


def test_responses_end_where_their_prompts_say(paths):
    """Sampled: n tokens with eos after a prompt that ends in kind n; to the limit after a plain word."""
    tokenizer = load_tokenizer(paths["policy"])
    model = AutoModelForCausalLM.from_pretrained(paths["policy"])
    kinds = speed.token_kinds(SHAPE["vocab_size"], LIMIT)
    assert max(kinds) == LIMIT and kinds.count(0) > 60
    torch.manual_seed(0)
    for kind in (1, 2, 5, LIMIT, 0):
        prompt = f"w9 w60 w{kinds.index(kind)}"
        ids = torch.tensor([tokenization.encode_prompt(tokenizer, prompt)] * 8)
        assert ids[0, 0] == tokenizer.bos_token_id and ids.shape == (8, 4)
        out = model.generate(
            ids, do_sample=True, top_k=0, max_new_tokens=LIMIT + 4, attention_mask=torch.ones_like(ids)
        )[:, 4:]
        ended = (out == tokenizer.eos_token_id).int()
        assert len(set(out[:, 0].tolist())) > 1 or kind == 1
        assert (ended.argmax(1) + 1 == kind).all() if kind else not ended.any()


def small_run(monkeypatch, out, pairs):
    offline = {"prompt": 8, "response": 24, "batch": 4, "micro": 2}
    tiny = {"model": SHAPE, "grpo": {"response": LIMIT}, "offline": offline}
    monkeypatch.setitem(speed.SIZES, "tiny", tiny)
    return speed.Args(size="tiny", pairs=pairs, steps=2, out=str(out), device="cpu")


def test_no_ratio_where_the_first_losses_or_the_versions_differ(monkeypatch, tmp_path):
    """One pair is enough to refuse; what a side says when it fails is the row's reason."""
    args = small_run(monkeypatch, tmp_path, 2)
    made = {"logged": {"loss": [1.2]}, "first": {}, "trl": "1", "versions": {"torch": "2.0+cpu"}}
    sides = []

    def run_side(python, spec, log):
        sides.append(spec["side"])
        return a_run([1, 2, 3], **made)

    def run_that_fails(python, spec, log):
        return {"error": "trl failed: no memory"}

    def this_python(*_):
        return "python"

    monkeypatch.setattr(speed, "python_with_trl", this_python)
    monkeypatch.setattr(speed, "run_side", run_side)
    assert speed.measure("sft", args, "cpu") == dict(name="sft", refused="not comparable: losses 1 and 1.2")
    assert sides == ["ours", "trl"]
    made["logged"] = {"loss": [1.0]}
    assert "refused" not in speed.measure("sft", args, "cpu")
    assert sides[2:] == ["ours", "trl", "trl", "ours"]
    monkeypatch.setattr(speed, "run_side", run_that_fails)
    assert speed.measure("sft", args, "cpu")["refused"] == "trl failed: no memory"


def test_one_pair(tmp_path, monkeypatch):
    """SFT, both sides for real: the losses agree."""
    pytest.importorskip("trl", reason="the peer of this comparison is optional: pip install trl")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PYTHONPATH")  # the tests' own: a user has none
    row = speed.measure("sft", small_run(monkeypatch, tmp_path, 1), "cpu")
    assert "refused" not in row
    our_loss, their_loss = row["losses"]
    assert our_loss == pytest.approx(their_loss, rel=1e-3)
    assert our_loss > 3
    assert row["ours_seconds"] > 0
    assert row["trl_peak_mb"] > 0
    _, least, most = row["ratio_seconds"]
    assert least == most  # of a single pair
    assert json.loads((tmp_path / "tiny/sft-0-trl.json").read_text())["steps"][2]["at"] > 0
    assert "| sft |" in speed.table([row])


def test_cost_that_grows_faster_than_its_formula_is_named(tmp_path):
    """Twice the work at 2.6 times the cost is; overhead, which makes cost grow slower, is not. And the
    picture is drawn."""
    assert speed.scaling.too_fast([1, 2.4, 4.8], [1, 2, 4]) == []
    assert speed.scaling.too_fast([1, 1.1, 2.9], [1, 2, 4]) == [2]

    def point(seconds, gflops):
        return {"seconds": seconds, "gflops": gflops, "peak_mb": 10.0, "formula_mb": 5.0}

    found = {
        ("batch", "grpo"): [(8, point(1, 1)), (16, point(2.6, 2))],
        ("batch", "ppo"): [(8, point(1, 1)), (16, point(2, 2))],
    }
    lines = speed.scaling.table(found).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["", "time", "", ""]
    speed.scaling.draw(found, str(tmp_path / "scaling.png"))
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_the_formulas_of_scaling():
    """Written out for GRPO and PPO at one point; group size is no term, twice the batch is twice the
    arithmetic."""
    at = dict(width=16, layers=2, vocab=100, batch=8, group=4, prompt=6, response=10, micro=2)
    weights = 2 * (4 * 16 * 16 + 3 * 16 * 40)
    assert speed.scaling.trunk(at) == weights
    assert weights == sum(p.numel() for p in a_llama(at).model.layers.parameters()) - 2 * 2 * 16  # norms
    body, head = 8 * (2 * weights * 16 + 2 * 2 * 16 * 16**2), 8 * 10 * 2 * 16 * 100
    assert speed.scaling.flops("grpo", at, 1) == 5 * body + 6 * head
    assert speed.scaling.flops("ppo", at, 4) == (3 + 12 + 2 + 12) * body + (3 + 16) * head
    assert speed.scaling.flops("dvpo", at | dict(group=2, batch=16), 4) == 2 * (16 * body + 19 * head)


def a_llama(at):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(
        hidden_size=at["width"], num_hidden_layers=at["layers"], vocab_size=at["vocab"], num_attention_heads=2
    )
    return LlamaForCausalLM(LlamaConfig(intermediate_size=speed.scaling.inner(at), **shape))
