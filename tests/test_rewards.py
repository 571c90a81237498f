"""Rewards: a model's folder, another tokenizer, a function."""

import copy

import pytest
import torch
from random_models import ARGS, EOS, plain, sample_sequences

from common.rewards import Reward
from common.tokenization import tokenize

pytestmark = pytest.mark.usefixtures("group")


def test_a_frozen_reward_model_is_read_where_its_own_config_says(folders, tokenizer, tmp_path):
    """Its config's padding token decides where transformers reads the score, also where our tokenizer pads
    with another."""
    model = plain(folders, "reward")
    model.config.pad_token_id = 9
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = Reward(str(tmp_path), tokenizer, ARGS)
    sequences = [(p, r + [EOS]) for p, r in sample_sequences(seed=11)]
    assert all(9 not in p + r for p, r in sequences)
    got = judge([{"prompt": ""}] * len(sequences), sequences, [""] * len(sequences))
    for score, (prompt, response) in zip(got, sequences, strict=True):
        with torch.no_grad():
            assert score.item() == pytest.approx(
                model(input_ids=torch.tensor([prompt + response])).logits.item(), abs=2e-5
            )


def test_reward_folder_is_standardised_and_reads_text_where_tokenizers_differ(folders, tokenizer, tmp_path):
    """(score - score_mean) / score_std of the config; another tokenizer means its own chat template and its
    own tokens."""
    model = plain(folders, "reward")
    model.config.score_mean = 0.5
    model.config.score_std = 2.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [{"prompt": "lunch : the soup ?"}, {"prompt": "dinner : the view and the wine ?"}]
    texts = ["the soup was warm .", "the view was not bad and the wine was good ."]
    tokens = tokenize(
        [{**r, "response": t} for r, t in zip(rows, texts, strict=True)], tokenizer, ("response",), 99, 99, ""
    )
    sequences = [(r["prompt_ids"], r["response_ids"]) for r in tokens]
    same = Reward(str(tmp_path), tokenizer, ARGS)(rows, sequences, texts)
    for score, (prompt, response) in zip(same, sequences, strict=True):
        with torch.no_grad():
            raw = model(input_ids=torch.tensor([prompt + response])).logits.item()
        assert score.item() == pytest.approx((raw - 0.5) / 2.0, abs=2e-5)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["zebra"])
    rubbish = [([7], [8])] * 2  # tokens of another vocabulary: not to be read
    torch.testing.assert_close(
        Reward(str(tmp_path), other, ARGS)(rows, rubbish, texts), same, rtol=0, atol=1e-6
    )
    by_text = Reward(str(tmp_path), tokenizer, ARGS, by_text=True)  # in any case
    torch.testing.assert_close(by_text(rows, rubbish, texts), same, rtol=0, atol=1e-6)


def test_reward_function_gets_columns_and_must_be_finite(tokenizer, tmp_path, monkeypatch):
    """(prompts, responses, **columns) in order; NaN stops with a line that names function and response; so
    does a bad name."""
    (tmp_path / "judge_of_tests.py").write_text(
        "def f(prompts, responses, gold, **others):\n"
        "    assert set(others) == {'row'}\n"
        "    return [10 * p + g + len(r) for p, r, g in zip(map(len, prompts), responses, gold)]\n"
        "def nan(prompts, responses, **_):\n    return [0.0, float('nan'), 1.0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"prompt": "p" * i, "gold": i / 8, "row": i, "prompt_ids": [1]} for i in (1, 2, 3)]
    texts = ["a", "bb", "cccc"]
    sequences = [([1], [2])] * 3
    score = Reward("judge_of_tests:f", tokenizer, ARGS)
    assert score(rows, sequences, texts).tolist() == [11.125, 22.25, 34.375] and score.label == "f"
    with pytest.raises(SystemExit) as stop:
        Reward("judge_of_tests:nan", tokenizer, ARGS)(rows, sequences, texts)
    assert (
        "judge_of_tests:nan gave nan" in str(stop.value)
        and "'bb'" in str(stop.value)
        and "\n" not in str(stop.value)
    )
    for name in ("judge_of_tests:missing", "no_such_module:f"):
        with pytest.raises(SystemExit, match=f"--reward {name}"):
            Reward(name, tokenizer, ARGS)
