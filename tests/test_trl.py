"""dpo.py, kto.py and grpo.py against the installed TRL: its trainers' own losses and gradients on the same tokens and model."""

import os

import pytest
import torch
from random_models import as_policy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
trl = pytest.importorskip("trl", reason="the peer of this comparison is optional: pip install trl")
from datasets import Dataset

import dpo
import grpo
import kto
from assets import reviews
from common.batches import collate
from common.logprobs import response_logprobs
from common.tokenization import load_tokenizer

PLAIN = dict(
    bf16=False,
    gradient_checkpointing=False,
    report_to="none",
    use_cpu=True,
    save_strategy="no",
    disable_tqdm=True,
)
LIMIT = 7


@pytest.fixture(scope="module")
def tokenizer():
    """pad is eos, so that no token is forbidden: TRL forbids none (see the test of that difference)."""
    tokenizer = load_tokenizer(reviews.folder("untrained"))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Two random Llamas near one another, far from uniform."""
    root = tmp_path_factory.mktemp("trl")
    shape = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    special = dict(
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **special, **shape))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 2  # or hardly a rollout would end
    model.save_pretrained(root / "a")
    shift(model, 0.02)
    model.save_pretrained(root / "b")
    return root


def shift(model, scale):
    """Moves all weights at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)


def opened(path):
    """A plain transformers model with our log-probabilities on it; no dropout, no forbidden token."""
    return as_policy(AutoModelForCausalLM.from_pretrained(path))


def summed(model, sequences):
    return model.response_logprobs(**collate(sequences, 2, "cpu"))[0].sum(1)


def assert_same(model, theirs, ours):
    """The two losses and their gradients for every weight, to 1e-5."""
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (theirs, ours)]
    assert max(g.abs().max() for g in gradients[0]) > 1e-3  # there is something to compare
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def words(seed, *sizes):
    """Random tokens, no special one among them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(len(reviews.SPECIAL), len(reviews.WORDS), (n,), generator=generator).tolist()
        for n in sizes
    ]


# --- DPO -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dpo_trainer(folders, tokenizer, tmp_path_factory):
    args = trl.DPOConfig(str(tmp_path_factory.mktemp("dpo")), beta=0.7, max_length=None, **PLAIN)
    rows = Dataset.from_list([dict(prompt="the soup", chosen=" was warm", rejected=" was not warm")] * 2)
    models = dict(model=opened(folders / "a"), ref_model=opened(folders / "b"))
    trainer = trl.DPOTrainer(**models, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.model.train()
    return trainer


def both_dpo(trainer, pairs, smoothing):
    """(TRL's loss of its trainer, ours), on [(prompt, chosen, rejected)] tokens."""
    batch = [dict(prompt_ids=p, chosen_ids=a, rejected_ids=b) for p, a, b in pairs]
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(batch))
    ratios = []
    for side in (1, 2):
        sequences = [(pair[0], pair[side]) for pair in pairs]
        with torch.no_grad():
            ref = summed(trainer.ref_model, sequences)
        ratios.append(summed(trainer.model, sequences) - ref)
    return theirs, dpo.dpo_loss(*ratios, 0.7, smoothing) / len(pairs)


PAIRS = list(zip(words(0, 3, 1, 5, 2), words(1, 6, 2, 1, 4), words(2, 4, 5, 3, 4), strict=True))


def test_dpo_loss_is_trls(dpo_trainer):
    """TRL's `sigmoid` loss on ragged pairs."""
    dpo_trainer.loss_types, dpo_trainer.label_smoothing = ["sigmoid"], 0.0
    assert_same(dpo_trainer.model, *both_dpo(dpo_trainer, PAIRS, 0.0))


def test_dpo_label_smoothing_is_that_of_trls_aot_on_one_pair(dpo_trainer):
    """TRL 1.16's `sigmoid` no longer reads label_smoothing (conservative DPO); its `aot`, on one pair nothing but the smoothed
    logistic loss, does, and agrees. Its `robust` is another, debiased loss: ((1 - e) l - e l') / (1 - 2 e)."""
    for pair in PAIRS[:2]:
        dpo_trainer.loss_types, dpo_trainer.label_smoothing = ["aot"], 0.2
        assert_same(dpo_trainer.model, *both_dpo(dpo_trainer, [pair], 0.2))
        dpo_trainer.loss_types = ["sigmoid"]
        theirs, plain = both_dpo(dpo_trainer, [pair], 0.0)
        assert theirs.item() == pytest.approx(plain.item(), abs=1e-5)
        _, turned = both_dpo(dpo_trainer, [(pair[0], pair[2], pair[1])], 0.0)
        dpo_trainer.loss_types = ["robust"]
        theirs, smoothed = both_dpo(dpo_trainer, [pair], 0.2)
        assert theirs.item() == pytest.approx((0.8 * plain - 0.2 * turned).item() / 0.6, abs=1e-5)
        assert abs(theirs.item() - smoothed.item()) > 1e-3


# --- KTO -------------------------------------------------------------------------------------------------------------

THUMBS = [
    dict(prompt_ids=p, completion_ids=y, label=label)
    for p, y, label in zip(
        words(3, 3, 1, 5, 2, 4), words(4, 6, 2, 1, 4, 3), [True, False, True, True, False], strict=True
    )
]


def kto_trainer(folders, tokenizer, path, rows, policy="a", reference="b"):
    args = trl.KTOConfig(
        str(path),
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.7,
        per_device_train_batch_size=len(rows),
        max_length=None,
        **PLAIN,
    )
    models = dict(model=opened(folders / policy), ref_model=opened(folders / reference))
    trainer = trl.KTOTrainer(
        **models, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.model.train()
    return trainer


TEXTS = [
    dict(prompt=f"the {prompt}", completion=f" was {word}", label=word != "bland")
    for prompt, word in (("soup", "warm"), ("waiter", "lovely"), ("soup", "bland"), ("waiter", "slow"))
]


def test_kto_loss_is_trls_on_our_mismatched_pairs(folders, tokenizer, tmp_path):
    """The whole loss with its reference point, the mismatched responses given to both. With policy and reference exchanged the
    mean over those pairs changes its sign, so that one of the two is clamped at 0."""
    prompts, points = [row["prompt_ids"] for row in THUMBS], []
    others = kto.mismatched(prompts, 0)
    batch = [
        row | dict(KL_completion_ids=THUMBS[j]["completion_ids"])
        for row, j in zip(THUMBS, others, strict=True)
    ]
    sequences = [(row["prompt_ids"], row["completion_ids"]) for row in batch]
    mismatches = [(row["prompt_ids"], row["KL_completion_ids"]) for row in batch]
    labels = torch.tensor([row["label"] for row in batch])
    for policy, reference in ("ab", "ba"):
        trainer = kto_trainer(folders, tokenizer, tmp_path, TEXTS, policy, reference)
        theirs = trainer.compute_loss(trainer.model, trainer.data_collator(batch))
        with torch.no_grad():
            ref, drift = (summed(trainer.ref_model, x) for x in (sequences, mismatches))
            point = (summed(trainer.model, mismatches) - drift).mean().clamp(min=0)
        points.append(point.item())
        assert trainer._metrics["train"]["kl"][-1] == pytest.approx(point.item(), abs=1e-5)
        log_ratios = summed(trainer.model, sequences) - ref
        assert_same(
            trainer.model, theirs, kto.kto_loss(log_ratios, labels, point, 0.3, 1.5, 0.7) / len(batch)
        )
    assert min(points) == 0 and max(points) > 0.1


def test_trls_mismatched_pairs_are_not_ours(folders, tokenizer, tmp_path):
    """On purpose: TRL rotates the completions by one within a batch, so neighbouring responses to one prompt are paired with that
    prompt; ours are drawn over the whole data and never are."""
    # responses to one prompt side by side, as data sets are
    rows = sorted(TEXTS, key=lambda row: row["prompt"])
    trainer = kto_trainer(folders, tokenizer, tmp_path, rows)
    found = list(trainer.train_dataset)
    completions = [row["completion_ids"] for row in found]
    assert [row["KL_completion_ids"] for row in found] == [completions[-1], *completions[:-1]]
    prompts = [row["prompt_ids"] for row in found]
    assert len(set(map(tuple, prompts))) == 2 and len(set(map(tuple, completions))) == 4
    assert any(prompts[i] == prompts[i - 1] for i in range(4))
    for seed in range(10):
        assert all(prompts[i] != prompts[j] for i, j in enumerate(kto.mismatched(prompts, seed)))


# --- GRPO ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generation(folders, tokenizer, tmp_path_factory):
    """(TRL's trainer, its own rollout scored by it, the rewards): three groups of four, the second with equal rewards; after it
    the policy has moved, so that ratios are not 1."""
    rewards = []

    def reward(prompts, completions, **_):
        rewards[:] = [0.1 if 4 <= i < 8 else len(text) * 0.3 + i % 3 for i, text in enumerate(completions)]
        return rewards

    args = trl.GRPOConfig(
        str(tmp_path_factory.mktemp("grpo")),
        beta=0.04,
        temperature=0.7,
        num_generations=4,
        per_device_train_batch_size=12,
        num_iterations=2,
        max_completion_length=LIMIT,
        **PLAIN,
    )
    prompts = [dict(prompt=text) for text in ("the soup", "the waiter was not", "and")]
    torch.manual_seed(0)
    trainer = trl.GRPOTrainer(
        str(folders / "a"),
        reward,
        args=args,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    model = as_policy(trainer.model.train())
    shift(trainer.ref_model, 0.01)
    scored = trainer._generate_and_score_completions([row for row in prompts for _ in range(4)])
    shift(model, 0.01)
    return trainer, scored, torch.tensor(rewards)


def ours_of(scored):
    """TRL's padded tokens as (prompt, response) pairs, ours to collate."""
    keep = lambda ids, mask: [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
    prompts, responses = (
        keep(scored[f"{kind}_ids"], scored[f"{kind}_mask"]) for kind in ("prompt", "completion")
    )
    return list(zip(prompts, responses, strict=True))


@pytest.mark.parametrize("scale_std", [True, False])
def test_group_advantages_are_trls(generation, scale_std):
    """Unbiased deviation + 1e-4 in both. One difference, on purpose: of equal rewards ours are exactly 0, TRL's a rounded mean
    over 1e-4."""
    trainer, scored, rewards = generation
    theirs = scored["advantages"]
    if not scale_std:  # what scale_rewards="none" computes
        std = rewards.view(-1, 4).std(1).repeat_interleave(4)
        theirs = theirs * (std + 1e-4)
    advantages, equal = grpo.group_advantages(rewards, 4, scale_std)
    assert equal.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    torch.testing.assert_close(advantages[~equal], theirs[~equal], rtol=0, atol=1e-5)
    assert (advantages[equal] == 0).all() and theirs[equal].abs().max() < 1e-3


@pytest.mark.parametrize(
    "theirs, ours", [("grpo", "grpo"), ("dr_grpo", "dr_grpo"), ("bnpo", "dapo"), ("dapo", "dapo")]
)
@pytest.mark.parametrize("clips", [(0.2, 0.2), (0.1, 0.28)])
def test_grpo_loss_is_trls(generation, theirs, ours, clips):
    """Clipped surrogate and k3 with each aggregation at temperature 0.7, ratios away from 1. Our `dapo` is of the mini-batch,
    TRL's `bnpo`; TRL's `dapo` divides by the tokens of the whole accumulation window, the same where that is one mini-batch."""
    trainer, scored, _ = generation
    trainer.loss_type, (trainer.epsilon_low, trainer.epsilon_high) = theirs, clips
    trainer.args.use_bias_correction_kl = False  # see the next test
    sequences = ours_of(scored)
    mb = collate(sequences, 2, "cpu")
    mask = mb["response_mask"]
    assert mask.equal(scored["completion_mask"].bool()) and len(set(mask.sum(1).tolist())) > 2  # ragged
    old, ref, advantages = (
        scored["old_per_token_logps"],
        scored["ref_per_token_logps"],
        scored["advantages"][:, None],
    )
    logprobs, entropy = trainer.model.response_logprobs(**mb, temperature=0.7)
    weights = grpo.token_weights(mask, ours, LIMIT)
    loss, sums = grpo.surrogate_loss(logprobs, old, advantages, weights, mask, *clips)
    loss = loss + 0.04 * (grpo.kl_estimates(logprobs, ref, mask)[1] * weights).sum()
    assert sums["clipped"] > 3  # the clip binds
    assert_same(trainer.model, trainer.compute_loss(trainer.model, scored), loss)
    logged, count = trainer._metrics["train"], mask.sum()
    assert logged["entropy"][-1] == pytest.approx((entropy.sum() / count).item(), abs=1e-5)
    k3 = grpo.kl_estimates(logprobs.detach(), ref, mask)[1]
    # a number near 10, in float32
    assert logged["kl"][-1] == pytest.approx((k3.sum() / count).item(), rel=1e-5)


def test_trls_kl_term_has_another_gradient_by_default(generation):
    """On purpose: ours is the paper's (2402.03300 eq. 3: k3 beside the surrogate). TRL 1.16 multiplies k3 by the ratio
    (DeepSeek-V3.2, 2512.02556), which even at ratio 1 changes the gradient: to that of KL(pi || pi_ref)."""
    trainer, scored, _ = generation
    trainer.loss_type, trainer.epsilon_low, trainer.epsilon_high, trainer.args.use_bias_correction_kl = (
        "dapo",
        0.2,
        0.2,
        True,
    )
    mb = collate(ours_of(scored), 2, "cpu")
    mask, old, ref = mb["response_mask"], scored["old_per_token_logps"], scored["ref_per_token_logps"]
    logprobs = trainer.model.response_logprobs(**mb, temperature=0.7)[0]
    weights = grpo.token_weights(mask, "dapo", LIMIT)
    loss, _ = grpo.surrogate_loss(logprobs, old, scored["advantages"][:, None], weights, mask, 0.2, 0.2)
    k3, ratio = grpo.kl_estimates(logprobs, ref, mask)[1], torch.where(mask, logprobs - old, 0.0).exp()
    assert_same(
        trainer.model, trainer.compute_loss(trainer.model, scored), loss + 0.04 * (k3 * ratio * weights).sum()
    )


def test_old_and_reference_log_probabilities_are_trls(generation, folders):
    """Of the policy that sampled and of TRL's moved reference, at temperature 0.7."""
    trainer, scored, _ = generation
    mask = scored["completion_mask"].bool()
    for model, key in (
        (opened(folders / "a"), "old_per_token_logps"),
        (trainer.ref_model, "ref_per_token_logps"),
    ):
        with torch.no_grad():
            ours = response_logprobs(as_policy(model), **collate(ours_of(scored), 2, "cpu"), temperature=0.7)[
                0
            ]
        torch.testing.assert_close(ours[mask], scored[key][mask], rtol=0, atol=1e-5)


def test_a_padding_token_of_its_own_is_what_trl_may_sample_and_we_may_not(generation):
    """On purpose: where pad is neither eos nor a stop, ours has probability zero, so each of our log-probabilities is TRL's less
    log(1 - p(pad)) of that step: the two differ by what a trained model hardly gives to pad."""
    trainer, scored, _ = generation
    model, mb = trainer.model, collate(ours_of(scored), 2, "cpu")
    mask, pad = mb["response_mask"], 0
    with torch.no_grad():
        plain = model.response_logprobs(**mb)[0]
        renormalised = as_policy(model, pad).response_logprobs(**mb)[0]
        as_policy(model)
        for row, (prompt, response) in enumerate(ours_of(scored)):
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            expected = -torch.log1p(-logits.softmax(-1)[:, pad])
            difference = (renormalised - plain)[row, : len(response)]
            torch.testing.assert_close(difference, expected, rtol=0, atol=1e-5)
    assert ((renormalised > plain) == mask).all()
