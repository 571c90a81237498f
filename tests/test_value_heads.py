"""What value and reward models say of a response, against plain transformers on one sequence at a time."""

import copy

import pytest
import torch
from random_models import ARGS, EOS, PAD, plain, sample_sequences

from assets import reviews
from common.batches import collate, run_micro_batches
from common.checkpoints import export
from common.models import load_model
from common.optimizer import backward
from common.rewards import Reward
from common.value_heads import response_values, sequence_scores

pytestmark = pytest.mark.usefixtures("group")


def test_response_values_alignment(folders, tokenizer):
    """Column 0 is the output at the last prompt token, column t that at y_t; zero where masked; padding
    changes nothing."""
    reference = plain(folders, "value")
    sequences = sample_sequences()
    model = load_model("value", folders["value"], tokenizer, ARGS, trained=False)
    width = max(len(r) for _, r in sequences) + 1
    values = run_micro_batches(lambda mb: response_values(model, **mb), sequences, 2, PAD, width)
    for i, (prompt, response) in enumerate(sequences):
        with torch.no_grad():
            outputs = reference(input_ids=torch.tensor([prompt + response])).logits[0, :, 0]
        torch.testing.assert_close(values[i, 0], outputs[len(prompt) - 1], rtol=0, atol=2e-5)
        for t in range(1, len(response) + 1):
            torch.testing.assert_close(values[i, t], outputs[len(prompt) + t - 1], rtol=0, atol=2e-5)
        assert (values[i, len(response) + 1 :] == 0).all()
    # a rank with nothing to do: one masked sequence, all zero in spite of the head's bias
    batch = collate([], PAD, "cpu")
    assert (response_values(model, **batch) == 0).all()


def test_a_value_model_from_a_policy_starts_at_zero(folders, tokenizer):
    """A head that the folder has not is zero, so that the first values are 0 everywhere, and it is
    trained."""
    model = load_model("value", folders["policy"], tokenizer, ARGS, trained=True)
    values = response_values(model, **collate(sample_sequences(), PAD, "cpu"))
    assert (values == 0).all()
    backward(((values - 1) ** 2).sum())
    assert model.score.weight.grad.abs().max() > 0


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_reward_model_scores_do_not_depend_on_padding(folders, tokenizer, pad_is_eos):
    """A ragged batch of answers that end with eos scores as plain transformers does one by one, at the last
    token that is not padding."""
    pad = EOS if pad_is_eos else PAD
    tokenizer = copy.deepcopy(tokenizer)
    reference = plain(folders, "reward")
    tokenizer.pad_token = reviews.SPECIAL[pad]
    model = load_model("reward", folders["reward"], tokenizer, ARGS, trained=True)
    sequences = [(p, r + [EOS]) for p, r in sample_sequences(seed=10)]
    got = run_micro_batches(lambda mb: sequence_scores(model, **mb), sequences, 2, pad, 1)[:, 0]
    for score, (prompt, response) in zip(got, sequences, strict=True):
        tokens = prompt + response
        with torch.no_grad():
            hidden = reference.model(input_ids=torch.tensor([tokens])).last_hidden_state[
                0, -2 if pad_is_eos else -1
            ]
            assert score.item() == pytest.approx(reference.score(hidden).item(), abs=2e-5)
    assert got.std() > 0.1


def test_a_critic_from_a_reward_model_starts_at_its_standardised_score(folders, tokenizer, tmp_path):
    """PPO's critic from reward.py's folder: at the last token it gives the score that Reward gives, once
    standardised."""
    model = plain(folders, "reward")
    model.config.score_mean = 0.5
    model.config.score_std = 2.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sequences = sample_sequences(seed=11)
    critic = load_model("value", str(tmp_path), tokenizer, ARGS, trained=True)
    mask = collate(sequences, PAD, "cpu")["response_mask"]
    values = run_micro_batches(lambda mb: response_values(critic, **mb), sequences, 2, PAD, mask.shape[1] + 1)
    scores = Reward(str(tmp_path), tokenizer, ARGS).of_model(sequences)
    torch.testing.assert_close(
        values.gather(1, mask.sum(1, keepdim=True)).squeeze(1), scores, rtol=0, atol=2e-5
    )
    export(critic, tokenizer, str(tmp_path / "out"), "fp32")
    # not standardised a second time
    again = load_model("value", str(tmp_path / "out"), tokenizer, ARGS, trained=False)
    torch.testing.assert_close(
        response_values(again, **collate(sequences, PAD, "cpu")), values, rtol=0, atol=2e-5
    )
