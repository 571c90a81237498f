"""gvm_td.py's data section, step by step: which rows it trains on, which pairs it evaluates, what it refuses;
and what it writes at the end. (Its targets, its loss and its normalisation: test_temporal_differences.py, test_worlds.py.)"""

import json

import pytest
import torch

import gvm_td
from assets import reviews
from common.tokenization import load_tokenizer

# Five prompts, each with three scored responses by two policies; the same prompts with a pair each.
SCORED = [
    {"prompt": f"lunch : the {topic} ?", "response": response, "reward": reward, "policy": policy}
    for topic in ("soup", "fish", "cake", "rice", "bread")
    for response, reward, policy in (
        ("the soup was good .", 1.0, "kind"),
        ("very bad .", -1.0, "grump"),
        ("very warm .", 0.5, "kind"),
    )
]
PAIRS = [
    {
        "prompt": f"lunch : the {topic} ?",
        "chosen": "the soup was good .",
        "rejected": "very bad .",
        "chosen_policy": "kind",
        "rejected_policy": "grump",
    }
    for topic in ("soup", "fish", "cake", "rice", "bread")
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(reviews.folder("policy"))


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def scored(tmp_path):
    return write(tmp_path, "scored.jsonl", SCORED)


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path, "pairs.jsonl", PAIRS)


def prompts(rows):
    return {row["prompt"] for row in rows}


# --- reading ------------------------------------------------------------------------------------------------


def test_a_source_is_read_as_what_it_holds(scored, pairs):
    args = gvm_td.Args()
    rows = gvm_td.read_source(scored, "train", "scores", "all", args)
    assert [row["reward"] for row in rows] == [row["reward"] for row in SCORED]
    rows = gvm_td.read_source(pairs, "train", "preference", "all", args)
    assert [row["chosen"] for row in rows] == [row["chosen"] for row in PAIRS]


def test_scores_are_needed_unless_a_reward_model_gives_them(tmp_path):
    """Without --reward a row without a reward ends the run; with it the data set needs none."""
    bare = [{"prompt": row["prompt"], "response": row["response"]} for row in SCORED]
    path = write(tmp_path, "bare.jsonl", bare)
    with pytest.raises(SystemExit, match="no 'reward'"):
        gvm_td.read_source(path, "train", "scores", "all", gvm_td.Args())
    rows = gvm_td.read_source(path, "train", "scores", "all", gvm_td.Args(reward="m:f"))
    assert len(rows) == len(SCORED)


def test_long_responses_are_dropped_and_counted(scored, pairs, tmp_path, capsys):
    """A pair goes where either of its sides is over --max-characters, a response where it is itself."""
    args = gvm_td.Args(max_characters=len("very warm ."))
    rows = gvm_td.read_source(scored, "train", "scores", "all", args)
    assert {row["response"] for row in rows} == {"very bad .", "very warm ."}
    assert "dropped 5 of 15 rows: response over --max-characters 11" in capsys.readouterr().out
    short = PAIRS[0] | {"chosen": "very warm ."}
    mixed = write(tmp_path, "mixed.jsonl", [*PAIRS, short])
    rows = gvm_td.read_source(mixed, "train", "preference", "all", args)
    assert [row["chosen"] for row in rows] == ["very warm ."]
    with pytest.raises(SystemExit, match="every response is over --max-characters 11"):
        gvm_td.read_source(pairs, "train", "preference", "all", args)


def test_training_and_held_out_prompts_do_not_meet(scored):
    args = gvm_td.Args(dataset=scored, source="scores", eval_fraction=0.5)
    training, held_out = gvm_td.read_training_and_held_out(args)
    assert training and held_out
    assert not prompts(training) & prompts(held_out)
    assert prompts(training) | prompts(held_out) == prompts(SCORED)


def test_two_sources_hold_the_same_prompts_out(tmp_path):
    """One data set read as scores to learn from and as pairs to evaluate on: the prompts are disjoint all the
    same."""
    both = [row | scored for row in PAIRS for scored in SCORED if scored["prompt"] == row["prompt"]]
    path = write(tmp_path, "both.jsonl", both)
    args = gvm_td.Args(dataset=path, source="scores", eval_source="preference", eval_fraction=0.5)
    training, held_out = gvm_td.read_training_and_held_out(args)
    _, held_out_of_scores = gvm_td.read_training_and_held_out(
        gvm_td.Args(dataset=path, source="scores", eval_fraction=0.5)
    )
    assert prompts(held_out) == prompts(held_out_of_scores)
    assert not prompts(training) & prompts(held_out)


def test_an_evaluation_data_set_leaves_all_rows_to_learn_from(scored, pairs):
    """It is read whole, as --eval-source; nothing of --dataset is held out."""
    args = gvm_td.Args(
        dataset=scored, source="scores", eval_dataset=pairs, eval_split="train", eval_source="preference"
    )
    training, held_out = gvm_td.read_training_and_held_out(args)
    assert [row["response"] for row in training] == [row["response"] for row in SCORED]
    assert [row["chosen"] for row in held_out] == [row["chosen"] for row in PAIRS]


# --- rows ---------------------------------------------------------------------------------------------------


def test_a_pair_becomes_two_responses():
    """Chosen before rejected, with the returns +1 and -1, each with its own policy, which may be unknown."""
    rows = gvm_td.two_responses([PAIRS[0], {"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert [row["response"] for row in rows] == ["the soup was good .", "very bad .", "a", "b"]
    assert [row["reward"] for row in rows] == [1.0, -1.0, 1.0, -1.0]
    assert [row["policy"] for row in rows] == ["kind", "grump", None, None]
    assert rows[0]["prompt"] == rows[1]["prompt"] == PAIRS[0]["prompt"]


def test_training_rows_of_scores_and_of_pairs(tokenizer):
    rows = gvm_td.load_training_rows(SCORED, tokenizer, gvm_td.Args(source="scores"))
    assert [row["reward"] for row in rows] == [row["reward"] for row in SCORED]
    rows = gvm_td.load_training_rows(PAIRS, tokenizer, gvm_td.Args(source="preference"))
    assert [row["reward"] for row in rows] == [1.0, -1.0] * len(PAIRS)
    for row in rows:
        assert tokenizer.decode(row["response_ids"], skip_special_tokens=True) == row["response"]


def test_training_rows_that_are_all_held_out(tokenizer):
    with pytest.raises(SystemExit, match="data.jsonl: every prompt is held out; lower --eval-fraction"):
        gvm_td.load_training_rows([], tokenizer, gvm_td.Args(dataset="data.jsonl"))


def test_held_out_rows_follow_the_evaluation_source(tokenizer):
    """--eval-source decides, not --source; without it, --source."""
    args = gvm_td.Args(source="scores", eval_source="preference")
    assert len(gvm_td.load_held_out_rows(PAIRS, tokenizer, args)) == 2 * len(PAIRS)
    args = gvm_td.Args(source="scores")
    assert len(gvm_td.load_held_out_rows(SCORED, tokenizer, args)) == len(SCORED)


def test_no_held_out_rows(tokenizer):
    """The message names the data set that the pairs would come from."""
    args = gvm_td.Args(dataset="data.jsonl")
    with pytest.raises(SystemExit, match="data.jsonl: no held-out pair"):
        gvm_td.load_held_out_rows([], tokenizer, args)
    args = gvm_td.Args(dataset="data.jsonl", eval_dataset="held.jsonl")
    with pytest.raises(SystemExit, match="held.jsonl: no held-out pair"):
        gvm_td.load_held_out_rows([], tokenizer, args)


def test_a_judge_replaces_the_rewards(tokenizer):
    """It gets the rows, their tokens and their texts, of a response that was cut what is left of it, and its
    rewards stand in their order."""
    end = tokenizer.eos_token_id
    word = tokenizer("the", add_special_tokens=False)["input_ids"]
    rows = [
        {"prompt": "p", "response": text, "reward": 9.0, "prompt_ids": [1], "response_ids": ids}
        for text, ids in (("the", [*word, end]), ("the food", word))
    ]

    def judge(given, sequences, texts):
        assert given is rows
        assert sequences == [([1], [*word, end]), ([1], word)]
        assert texts == ["the", "the"]
        return torch.tensor([0.5, -0.5])

    gvm_td.judge_rows(rows, judge, tokenizer)
    assert [row["reward"] for row in rows] == [0.5, -0.5]


# --- pairs --------------------------------------------------------------------------------------------------


def texts_of(pairs):
    return sorted((row["prompt"], row["response"], other["response"]) for row, other in pairs)


def test_preference_data_are_the_pairs_whatever_the_gap(tokenizer):
    """Each pair once, chosen first, also where two pairs have the same prompt, and with any --eval-gap."""
    twice = [*PAIRS, PAIRS[0] | {"chosen": "very warm ."}]
    for gap in (0.0, 100.0):
        args = gvm_td.Args(source="preference", eval_gap=gap)
        pairs = gvm_td.load_pairs(gvm_td.load_held_out_rows(twice, tokenizer, args), args)
        assert texts_of(pairs) == sorted((row["prompt"], row["chosen"], row["rejected"]) for row in twice)


def test_a_long_prompt_takes_its_whole_pair(tokenizer):
    """The sides of the other pairs still belong together."""
    long = PAIRS[1] | {"prompt": "lunch : " + "the soup and " * 20 + "the fish ?"}
    args = gvm_td.Args(source="preference", max_prompt_length=16)
    rows = gvm_td.load_held_out_rows([PAIRS[0], long, PAIRS[2]], tokenizer, args)
    pairs = gvm_td.load_pairs(rows, args)
    kept = (PAIRS[0], PAIRS[2])
    assert texts_of(pairs) == sorted((row["prompt"], row["chosen"], row["rejected"]) for row in kept)


def test_scores_make_the_pairs_that_are_a_gap_apart():
    """Of rewards 1, -1 and 0.5 to each prompt: three pairs, two of them at least 1 apart, one at least 2."""
    for gap, expected in ((0.0, 3), (1.0, 2), (2.0, 1)):
        pairs = gvm_td.load_pairs(SCORED, gvm_td.Args(source="scores", eval_gap=gap))
        assert len(pairs) == expected * 5
        assert all(better["reward"] - worse["reward"] >= gap for better, worse in pairs)
        assert all(better["prompt"] == worse["prompt"] for better, worse in pairs)
    with pytest.raises(SystemExit, match="lower --eval-gap"):
        gvm_td.load_pairs(SCORED, gvm_td.Args(source="scores", eval_gap=2.5))


def test_at_most_so_many_pairs_are_drawn_and_always_the_same(monkeypatch):
    monkeypatch.setattr(gvm_td, "MAX_PAIRS", 4)
    args = gvm_td.Args(source="scores", seed=1)
    pairs = gvm_td.load_pairs(SCORED, args)
    assert len(pairs) == 4
    assert len(set(texts_of(pairs))) == 4
    assert pairs == gvm_td.load_pairs(SCORED, gvm_td.Args(source="scores", seed=2))


# --- scores -------------------------------------------------------------------------------------------------


def test_scores_are_standardised():
    scores, mean, std = gvm_td.standardised_scores(SCORED, gvm_td.Args(source="scores"))
    given = torch.tensor([row["reward"] for row in SCORED], dtype=torch.float64)
    assert scores.mean().item() == pytest.approx(0, abs=1e-12)
    assert scores.std().item() == pytest.approx(1)
    torch.testing.assert_close(scores * std + mean, given)


def test_returns_of_pairs_stay_as_they_are_unless_a_reward_model_judged():
    rows = [{"reward": 1.0}, {"reward": -1.0}]
    scores, mean, std = gvm_td.standardised_scores(rows, gvm_td.Args(source="preference"))
    assert scores.tolist() == [1.0, -1.0] and (mean, std) == (0.0, 1.0)
    rows = [{"reward": 5.0}, {"reward": 3.0}]
    scores, mean, std = gvm_td.standardised_scores(rows, gvm_td.Args(source="preference", reward="m:f"))
    assert mean == 4.0 and std == pytest.approx(2**0.5)
    assert scores.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])


def test_equal_scores_teach_nothing():
    with pytest.raises(SystemExit, match="data.jsonl: all rewards are 2.0"):
        gvm_td.standardised_scores([{"reward": 2.0}] * 3, gvm_td.Args(dataset="data.jsonl", source="scores"))


# --- the end ------------------------------------------------------------------------------------------------


def test_averages_and_baselines_by_hand():
    """Two policies of average 0.75 and -1; a policy that was never seen counts 0, a tie is not a win."""
    averages = gvm_td.policy_averages(SCORED)
    assert averages == {"kind": pytest.approx(0.75), "grump": pytest.approx(-1.0)}
    kind, grump, new = ({"response": "abc", "policy": policy} for policy in ("kind", "grump", "new"))
    short = {"response": "a", "policy": "kind"}
    pairs = [(kind, grump), (grump, kind), (kind, short), (new, grump)]
    assert gvm_td.baseline_accuracies(pairs, averages) == {"baseline_length": 1 / 4, "baseline_policy": 2 / 4}


def test_table_names_the_known_policies(tmp_path, capsys):
    path = tmp_path / "accuracy.json"
    gvm_td.write_table(path, {"mean": 0.5, "last": 0.25}, 8, {"kind": 1.0, None: 3.0})
    expected = {"mean": 0.5, "last": 0.25, "pairs": 8, "policy_averages": {"kind": 1.0}}
    assert json.loads(path.read_text()) == expected
    assert capsys.readouterr().out == "accuracy on held-out pairs: mean 0.500, last 0.250\n"
