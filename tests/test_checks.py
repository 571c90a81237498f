"""What is opened is compared with its own forward: right, or one line.

Every fault here is one that a family of models, a library or a folder could bring: a model of a known kind whose
forward does something more, so that no list of names would know it.
"""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import make_policy
from random_models import ARGS, EOS, PAD, plain, sample_sequences
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

from assets import reviews
from common import checks
from common.batches import collate
from common.checkpoints import export
from common.logprobs import OutputForm
from common.models import load_model
from common.rewards import Reward
from common.rollout import check_sampler, decode, rollout
from common.tokenization import load_tokenizer, stop_tokens
from common.value_heads import response_values

pytestmark = pytest.mark.usefixtures("group")
WORDS = len(reviews.WORDS)


def args_with(**changes) -> SimpleNamespace:
    return SimpleNamespace(**vars(ARGS) | changes)


# --- policies: how logits come from the last hidden state ---------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "family, expected",
    [
        ("llama", lambda config: OutputForm()),
        ("cohere", lambda config: OutputForm(scale=config.logit_scale)),
        ("granite", lambda config: OutputForm(scale=1 / config.logits_scaling)),
        ("gemma2", lambda config: OutputForm(cap=config.final_logit_softcapping)),
        ("recurrent_gemma", lambda config: OutputForm(cap=config.logits_soft_cap)),
        ("falcon_h1", lambda config: OutputForm(scale=config.lm_head_multiplier)),
        ("t5", lambda config: OutputForm(hidden_scale=config.d_model**-0.5)),
    ],
)
def test_scale_and_cap_are_measured_and_are_exactly_the_configurations(tmp_path, family, expected, precision):
    """Not by their names in the configuration: by the model's own forward, whatever the precision."""
    make_policy(family, tmp_path / family)
    tokenizer = load_tokenizer(str(tmp_path / family))
    policy = load_model(
        "policy", str(tmp_path / family), tokenizer, args_with(precision=precision), trained=False
    )
    form = expected(policy.config)
    assert policy.output_form.cap == form.cap
    assert policy.output_form.scale == pytest.approx(form.scale, rel=1e-12)
    assert policy.output_form.hidden_scale == pytest.approx(form.hidden_scale, rel=1e-12)


def change_forward(monkeypatch, change):
    """All Llama policies from here on give `change(self, logits)`."""
    real = LlamaForCausalLM.forward

    @functools.wraps(real)  # the sampler asks for the names of its arguments
    def forward(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.logits = change(self, out.logits)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)


def favour_a_token(self, logits):
    return logits + 3 * F.one_hot(torch.tensor(7), logits.shape[-1])


def square(self, logits):
    return logits * logits.abs()


FAULTS = {
    "a scale that no entry names": lambda self, logits: logits * 0.9173,
    "a bias after the layer": favour_a_token,
    "another function": square,
    "not a number": lambda self, logits: logits * math.nan,
    "a traceback": lambda self, logits: logits.no_such_thing,
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_logits_that_are_not_a_linear_layers_are_one_line(folders, tokenizer, monkeypatch, fault, trained):
    change_forward(monkeypatch, FAULTS[fault])
    with pytest.raises(SystemExit, match=f"^error: {folders['policy']}: .*llama model") as error:
        load_model("policy", folders["policy"], tokenizer, ARGS, trained=trained)
    assert "\n" not in str(error.value)


def test_a_transform_before_the_output_layer_is_one_line(folders, tokenizer, monkeypatch):
    """As BERT has it: the head is more than one layer."""
    real = LlamaForCausalLM.__init__

    def init(self, config):
        real(self, config)
        self.lm_head.register_forward_pre_hook(lambda module, inputs: (F.gelu(inputs[0]),))

    monkeypatch.setattr(LlamaForCausalLM, "__init__", init)
    with pytest.raises(SystemExit, match="more than a linear layer"):
        load_model("policy", folders["policy"], tokenizer, ARGS, trained=True)


def test_a_trunk_that_reads_padding_is_one_line(folders, tokenizer, monkeypatch):
    """Its log-probabilities in a padded batch are not those of a sequence alone."""
    real = transformers.LlamaModel.forward

    def forward(self, input_ids=None, **kwargs):
        out = real(self, input_ids=input_ids, **kwargs)
        out.last_hidden_state = out.last_hidden_state + 0.3 * (input_ids == PAD).sum()
        return out

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    with pytest.raises(SystemExit, match="of a padded batch in training are .* nats a token off"):
        load_model("policy", folders["policy"], tokenizer, ARGS, trained=True)


def test_a_model_that_draws_random_numbers_in_training_is_one_line(folders, tokenizer, monkeypatch):
    """Even where this time they change nothing: a layer that is left out one time in a thousand."""
    real = transformers.LlamaModel.forward

    def forward(self, *args, **kwargs):
        if self.training and torch.rand(()) < 1e-9:
            raise AssertionError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    load_model("policy", folders["policy"], tokenizer, ARGS, trained=False)
    with pytest.raises(SystemExit, match="draws random numbers in its forward pass in training"):
        load_model("policy", folders["policy"], tokenizer, ARGS, trained=True)


def test_another_function_in_training_is_one_line(folders, tokenizer, monkeypatch):
    real = transformers.LlamaModel.forward

    def forward(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state * (1 + 0.5 * self.training)
        return out

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    load_model("policy", folders["policy"], tokenizer, ARGS, trained=False)
    with pytest.raises(SystemExit, match="nats a token off log_softmax of its own logits"):
        load_model("policy", folders["policy"], tokenizer, ARGS, trained=True)


def test_dropout_is_off_in_the_parts_of_a_configuration_too(tmp_path):
    """Of a model of text and pictures the text is inside."""
    make_policy("gemma3", tmp_path / "gemma3")
    file = tmp_path / "gemma3" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["attention_dropout"] = 0.5
    file.write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path / "gemma3"))
    policy = load_model("policy", str(tmp_path / "gemma3"), tokenizer, ARGS, trained=True)
    assert policy.config.text_config.attention_dropout == 0


# --- tokens --------------------------------------------------------------------------------------------------


def wider(folders, folder, rows: int) -> str:
    """The policy's folder with `rows` more embeddings than its tokenizer has tokens, likely ones."""
    model = plain(folders, "policy")
    model.resize_token_embeddings(WORDS + rows, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[WORDS:] = 2 * model.lm_head.weight[10]
    model.save_pretrained(folder)
    load_tokenizer(folders["policy"]).save_pretrained(folder)
    return str(folder)


def test_tokens_beyond_the_tokenizers_are_never_sampled(folders, tokenizer, tmp_path):
    """Nor in the log-probabilities' sum, so that what samples is what trains."""
    policy = load_model("policy", wider(folders, tmp_path, 9), tokenizer, ARGS, trained=True)
    assert policy.forbidden_tokens.tolist() == [PAD, *range(WORDS, WORDS + 9)]
    prompts = [prompt for prompt, _ in sample_sequences()] * 20
    responses, sampled = rollout(policy, tokenizer, prompts, 12, 1.0, (0, 0))
    assert max(token for response in responses for token in response) < WORDS
    probabilities = torch.stack(
        [
            policy.response_logprobs(**collate([(prompts[0], [word])], PAD, "cpu"))[0][0, 0].detach().exp()
            for word in range(WORDS + 9)
        ]
    )
    assert probabilities[:WORDS].sum() == pytest.approx(1, abs=1e-5) and not probabilities[WORDS:].any()


def test_fewer_logits_than_rows_are_fewer_tokens(folders, tokenizer, tmp_path, monkeypatch):
    """Inkling pads its output layer: the rows beyond are no tokens."""
    name = wider(folders, tmp_path, 9)
    change_forward(monkeypatch, lambda self, logits: logits[..., : WORDS - 2])
    policy = load_model("policy", name, tokenizer, ARGS, trained=True)
    assert policy.forbidden_tokens.tolist() == [PAD, *range(WORDS - 2, WORDS + 9)]
    check_sampler(policy, tokenizer, [[5, 6, 7], [8, 9], [5], [9, 9, 9, 9]], 8, 1.0)


def test_a_pad_token_that_the_model_has_no_embedding_of_is_one_line(folders, tmp_path):
    tokenizer = load_tokenizer(folders["policy"])
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    for kind in ("policy", "value"):
        with pytest.raises(SystemExit, match=f"pad token '<new pad>' is number {WORDS}, and the model has"):
            load_model(kind, folders[kind], tokenizer, ARGS, trained=True)


def test_a_pad_token_in_the_config_that_is_no_token_is_one_line(folders, tokenizer, tmp_path):
    model = plain(folders, "reward")
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    for pad in (-1, WORDS):
        config = json.loads(Path(tmp_path, "config.json").read_text()) | {"pad_token_id": pad}
        Path(tmp_path, "config.json").write_text(json.dumps(config))
        with pytest.raises(SystemExit, match=f"pad_token_id {pad} of its config.json is none of its"):
            load_model("reward", str(tmp_path), tokenizer, ARGS, trained=False)


def test_ends_that_only_the_generation_config_names_end_a_response_and_are_exported(
    folders, tokenizer, tmp_path, capsys
):
    special = tokenizer.bos_token_id  # as good as any: a token that is no text
    model = plain(folders, "policy")
    model.save_pretrained(tmp_path / "in"), tokenizer.save_pretrained(tmp_path / "in")
    Path(tmp_path, "in", "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, special, 9]}))
    own = load_tokenizer(str(tmp_path / "in"))
    assert stop_tokens(own) == sorted({EOS, special})
    assert "ends answers by 9" in capsys.readouterr().out
    policy = load_model("policy", str(tmp_path / "in"), own, ARGS, trained=True)
    with torch.no_grad():  # all logits are 0, so that the first token that is not padding is the likeliest
        policy.model.norm.weight.zero_()
    assert special == PAD + 1 and rollout(policy, own, [[5, 6]], 8, 0.0, (0, 0))[0] == [[special]]
    export(policy, own, str(tmp_path / "out"), "fp32")
    generation = json.loads(Path(tmp_path, "out", "generation_config.json").read_text())
    assert generation["eos_token_id"] == sorted({EOS, special})


@pytest.mark.parametrize("setting", [{"min_p": 0.05}, {"early_stopping": True}, {"typical_p": 0.9}])
def test_a_generation_config_that_cannot_be_saved_is_named_before_training(
    folders, tokenizer, tmp_path, capsys, setting
):
    model = plain(folders, "policy")
    model.save_pretrained(tmp_path / "in"), tokenizer.save_pretrained(tmp_path / "in")
    Path(tmp_path, "in", "generation_config.json").write_text(json.dumps(setting | {"eos_token_id": EOS}))
    policy = load_model("policy", str(tmp_path / "in"), tokenizer, ARGS, trained=True)
    assert "the tokens of its generation_config.json alone" in capsys.readouterr().out
    export(policy, tokenizer, str(tmp_path / "out"), "fp32")
    again = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert again.eos_token_id == EOS and all(getattr(again, key) in (None, False) for key in setting)


# --- sampling ------------------------------------------------------------------------------------------------


def test_a_cache_that_mixes_up_its_rows_is_one_line(folders, tokenizer, policy, monkeypatch):
    """Only where a response ends before the others: the check makes one end."""

    def reorder_cache(self, rows):
        if len(rows) < self.room[0].shape[0]:  # all but one keep their place
            rows = rows.flip(0)
        real(self, rows)

    from common.rollout import RoomyLayer

    real = RoomyLayer.reorder_cache
    monkeypatch.setattr(RoomyLayer, "reorder_cache", reorder_cache)
    with pytest.raises(SystemExit, match="llama model.*nats a token off the policy's"):
        check_sampler(policy, tokenizer, [[5, 6, 7], [8, 9], [5], [9, 9, 9, 9]], 12, 1.0)


def test_a_forward_that_fails_in_the_sampler_is_one_line(folders, tokenizer, policy, monkeypatch):
    monkeypatch.setattr("common.rollout.roomy", lambda config: (_ for _ in ()).throw(KeyError("states")))
    with pytest.raises(SystemExit, match="^error: a llama model cannot be sampled .KeyError: 'states'"):
        check_sampler(policy, tokenizer, [[5, 6, 7], [8, 9]], 12, 1.0)


@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_one_line_in_the_sampler(folders, heat):
    model = plain(folders, "policy")
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(SystemExit, match="llama model. gives logits that are not a number"), torch.no_grad():
        decode(model, [[5, 6], [7]], torch.rand(2, 4).double(), torch.full((2,), heat), [EOS], PAD)


# --- value and reward models ---------------------------------------------------------------------------------


def encoder(family: str, folder, tokenizer, labels: int = 1, **more) -> str:
    """A random encoder that classifies texts; all of its scores are far apart."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=labels,
        **more,
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return str(folder)


ENCODERS = ("bert", "roberta", "deberta-v2", "modernbert", "electra", "distilbert")


def bert_tokenizer(pairs: str = "$A [SEP] $B:1 [SEP]:1"):
    """One that joins two texts by its own tokens, and has no end of an answer and no template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(word for word in reviews.WORDS if word.isalpha())]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] " + pairs,
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_as_reward_model_is_called_as_its_card_calls_it(tmp_path, tokenizer, family):
    """`tokenizer(prompt, response)`, special tokens, kinds of text and mask, one pair at a time: padded and
    in batches our scores are those."""
    more = {"type_vocab_size": 2} if family in ("bert", "electra") else {}
    own = bert_tokenizer()
    if family not in ("bert", "electra"):
        own.model_input_names = ["input_ids", "attention_mask"]
    name = encoder(family, tmp_path / family, own, **more)
    words = [word for word in reviews.WORDS if word.isalpha()]
    rows = [{"prompt": " ".join(words[i : i + 1 + i % 4]), "row": i} for i in range(7)]
    texts = [" ".join(words[2 * i : 2 * i + 1 + i]) for i in range(7)]
    scores = Reward(name, tokenizer, ARGS, rows)(rows, [([], [EOS])] * 7, texts)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(name).eval()
    for row, text, score in zip(rows, texts, scores, strict=True):
        with torch.no_grad():
            expected = model(**own(row["prompt"], text, return_tensors="pt")).logits[0, 0]
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-5)
    assert scores.std() > 0.05


def test_an_encoder_is_no_value_model_and_reward_py_does_not_train_one(tmp_path, tokenizer):
    name = encoder("bert", tmp_path, tokenizer)
    with pytest.raises(SystemExit, match="a bert model reads later tokens too .an encoder."):
        load_model("reward", name, tokenizer, ARGS, trained=True)
    with pytest.raises(SystemExit, match="its value of a prompt would know the answer"):
        load_model("value", name, tokenizer, ARGS, trained=True)


def test_a_reward_model_that_reads_its_neighbours_padding_is_one_line(folders, tokenizer, monkeypatch):
    real = transformers.LlamaModel.forward

    def forward(self, input_ids=None, **kwargs):
        out = real(self, input_ids=input_ids, **kwargs)
        out.last_hidden_state = out.last_hidden_state + 0.3 * (input_ids == PAD).sum()
        return out

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    with pytest.raises(SystemExit, match="padding changes them and it is no reward model here"):
        load_model("reward", folders["reward"], tokenizer, ARGS, trained=False)
    with pytest.raises(SystemExit, match="changes with later tokens"):
        load_model("value", folders["policy"], tokenizer, ARGS, trained=True)  # its head is still zero


@pytest.mark.parametrize("labels", [2, 5])
def test_a_head_of_several_labels_is_one_line(folders, tokenizer, tmp_path, labels):
    config = LlamaConfig.from_pretrained(folders["reward"], num_labels=labels)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=f"its head has {labels} labels, and a reward model has one number"):
        load_model("reward", str(tmp_path), tokenizer, ARGS, trained=False)


def test_weights_of_another_size_are_one_line(folders, tokenizer, tmp_path):
    model = plain(folders, "policy")
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    config = json.loads(Path(tmp_path, "config.json").read_text()) | {"intermediate_size": 48}
    Path(tmp_path, "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"is \[.*64.*\] in its weights and \[.*48.*\] by its config.json"):
        load_model("policy", str(tmp_path), tokenizer, ARGS, trained=True)


# --- families without a class for the head -------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmo2", "lfm2", "granite"])
def test_the_value_model_of_any_family_opens_with_plain_transformers(tmp_path, family):
    """By the lines of docs/models.md."""
    make_policy(family, tmp_path / "policy")
    name = str(tmp_path / "policy")
    tokenizer = load_tokenizer(name)
    model = load_model("value", name, tokenizer, ARGS, trained=True)
    with torch.no_grad():
        model.score.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
        model.score.bias.fill_(0.3)
    export(model, tokenizer, str(tmp_path / "out"), "fp32")
    batch = collate(sample_sequences(), PAD, "cpu")
    values = response_values(model, **batch).detach()

    page = Path(__file__).resolve().parents[1].joinpath("docs/models.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    code = code.replace("runs/gvm_td/model", str(tmp_path / "out")).replace("Olmo2", PREFIX[family])
    space = {}
    exec(code, space)
    opened = space["model"].eval()
    for row, (prompt, response) in zip(values, sample_sequences(), strict=True):
        with torch.no_grad():
            expected = opened(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 :, 0]
        torch.testing.assert_close(row[: len(response) + 1], expected, rtol=0, atol=1e-5)
    again = load_model("value", str(tmp_path / "out"), tokenizer, ARGS, trained=False)
    assert torch.equal(response_values(again, **batch), values)


PREFIX = {"olmo2": "Olmo2", "lfm2": "Lfm2", "granite": "Granite"}


def test_where_transformers_has_the_class_it_is_taken(folders, tokenizer):
    assert type(load_model("value", folders["policy"], tokenizer, ARGS, trained=True)) is (
        LlamaForTokenClassification
    )


def test_what_is_no_text_model_is_one_line(tmp_path, tokenizer):
    """A model of pictures that transformers does not open as text."""
    config = transformers.CONFIG_MAPPING["qwen2_5_vl"]()
    config.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    for kind in ("policy",):
        with pytest.raises(SystemExit, match=f"^error: {tmp_path}: .*qwen2_5_vl") as error:
            load_model(kind, str(tmp_path), tokenizer, ARGS, trained=True)
        assert "\n" not in str(error.value)


def test_the_random_sequences_are_text(tokenizer):
    """No special token among them: one may stand for a picture."""
    tokens = {
        token
        for sequence in checks.random_sequences(checks.plain_tokens(tokenizer, WORDS))
        for part in sequence
        for token in part
    }
    assert len(tokens) > 10 and not tokens & {PAD, EOS, tokenizer.bos_token_id}
