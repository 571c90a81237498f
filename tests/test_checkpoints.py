"""Exports: folders that plain transformers opens, with the trained numbers."""

import copy
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from families import make_policy
from random_models import ARGS, BOS, EOS, PAD, plain, sample_sequences
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    Qwen2Config,
)

from assets import reviews
from common.batches import collate
from common.checkpoints import export
from common.models import load_model
from common.optimizer import adamw, backward, optimizer_step
from common.rollout import rollout
from common.tokenization import encode_prompt, load_tokenizer, stop_token
from common.value_heads import response_values

pytestmark = pytest.mark.usefixtures("group")


OPEN = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

root = sys.argv[1]
assert not any(name == "common" or name.startswith("common.") for name in sys.modules)
ids = torch.load(f"{root}/ids.pt")
policy = AutoModelForCausalLM.from_pretrained(f"{root}/p")
value = AutoModelForTokenClassification.from_pretrained(f"{root}/v")
tokenizer = AutoTokenizer.from_pretrained(f"{root}/p")
messages = [{"role": "user", "content": "lunch"}]
with torch.no_grad():
    found = {
        "policy": policy(ids).logits,
        "value": value(ids).logits,
        "chat": tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
        "score_std": value.config.score_std,
        "stop": policy.generation_config.eos_token_id,
    }
torch.save(found, f"{root}/out.pt")
"""


def test_exports_open_in_a_fresh_process_with_plain_transformers(folders, tokenizer, tmp_path):
    """After an optimizer step, a folder gives the trained model's values and logits without this repository,
    tokenizer and chat template included; a value model carries its statistics in its config."""
    sequences = sample_sequences(seed=8)
    batch = collate(sequences, PAD, "cpu")
    models = {
        kind: load_model(kind, folders[kind], tokenizer, ARGS, trained=True) for kind in ("policy", "value")
    }
    before = {}
    for kind, forward in (
        ("policy", lambda: models["policy"].response_logprobs(**batch)[0]),
        ("value", lambda: response_values(models["value"], **batch)),
    ):
        start = forward()
        backward((start**2).mean())
        optimizer_step(models[kind], adamw(models[kind], 0.0), 1e-2, start.sum().detach(), 1.0, "")
        before[kind] = forward().detach()
        assert (before[kind] - start).abs().max() > 1e-3
        extra = dict(score_std=1.5) if kind == "value" else {}
        export(models[kind], tokenizer, str(tmp_path / kind[0]), "fp32", **extra)
    torch.save(batch["input_ids"], tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", OPEN, str(tmp_path)], check=True, cwd=tmp_path, timeout=120)
    out = torch.load(tmp_path / "out.pt")
    assert out["chat"] == encode_prompt(tokenizer, "lunch") and out["score_std"] == 1.5 and out["stop"] == EOS
    out["policy"][:, :, PAD] = -math.inf
    table = out["policy"].log_softmax(-1)
    for i, (prompt, response) in enumerate(sequences):
        for t, token in enumerate(response):
            assert table[i, len(prompt) + t - 1, token].item() == pytest.approx(
                before["policy"][i, t].item(), abs=2e-5
            )
            assert out["value"][i, len(prompt) + t, 0].item() == pytest.approx(
                before["value"][i, t + 1].item(), abs=2e-5
            )


def test_tied_embeddings_stay_tied(tokenizer, tmp_path):
    """Through load, step and export, input and output embeddings are one tensor; the step is that of the
    unwrapped model."""
    name = str(tmp_path / "tied")
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    shape |= dict(vocab_size=len(reviews.WORDS), pad_token_id=PAD, initializer_range=0.2)
    config = LlamaConfig(tie_word_embeddings=True, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(name)
    model = load_model("policy", name, tokenizer, ARGS, trained=True)
    reference = AutoModelForCausalLM.from_pretrained(name)
    assert reference.config.tie_word_embeddings
    sequences = sample_sequences(seed=9)
    optimizer = adamw(model, 0.0)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())
    for _ in range(2):
        loss = -model.response_logprobs(**collate(sequences, PAD, "cpu"))[0].sum()
        backward(loss)
        total, norm = optimizer_step(model, optimizer, 1e-2, loss, 1.0, "")
        plain_loss = 0.0
        for prompt, response in sequences:
            logits = reference(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            logits = logits.index_fill(1, torch.tensor([PAD]), -math.inf)
            plain_loss = plain_loss - logits.log_softmax(-1)[range(len(response)), response].sum()
        plain_loss.backward()
        plain_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0).item()
        assert norm > 1.0  # the clip is at work
        assert (total, norm) == (
            pytest.approx(plain_loss.item(), rel=1e-4),
            pytest.approx(plain_norm, rel=1e-3),
        )
        theirs.step()
        theirs.zero_grad()
    export(model, tokenizer, str(tmp_path / "out"), "fp32")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.lm_head.weight is back.model.embed_tokens.weight
    ids = torch.tensor([[BOS, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, reference(ids).logits, rtol=0, atol=2e-3)


def test_layers_of_a_model_that_lists_their_types_are_exported(tokenizer, tmp_path):
    """Qwen's config names the type of each layer; fewer layers must come with a shorter list."""
    shape = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = Qwen2Config(
        vocab_size=len(reviews.WORDS), pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **shape
    )
    assert len(config.layer_types) == 3
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "whole")
    model = load_model("value", str(tmp_path / "whole"), tokenizer, ARGS, trained=True, layers=2)
    export(model, tokenizer, str(tmp_path / "out"), "fp32")
    assert AutoModelForTokenClassification.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2


def test_an_exported_policy_stops_where_the_rollout_did(folders, tokenizer, tmp_path):
    """generation_config.json names the chat template's end of turn, where that is not the eos, beside the
    eos."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<eos>", "<user>")  # any special token
    model = load_model("policy", folders["policy"], other, ARGS, trained=False)
    export(model, other, str(tmp_path / "out"), "fp32")
    stops = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id
    assert sorted([stops] if isinstance(stops, int) else stops) == sorted({EOS, stop_token(other)}) != [EOS]


def test_generation_settings_reach_the_export_but_not_the_rollout(folders, tokenizer, tmp_path):
    """A repetition penalty of the folder's generation config would make the rollout sample what no
    log-probability is of."""
    source = plain(folders, "policy")
    source.generation_config.repetition_penalty = 5.0
    source.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    policy = load_model("policy", str(tmp_path / "in"), tokenizer, ARGS, trained=False)
    prompts = [[BOS, 7, 8], [BOS, 9]] * 4
    unlike = load_model("policy", folders["policy"], tokenizer, ARGS, trained=False)
    assert (
        rollout(policy, tokenizer, prompts, 12, 1.0, (0, 0))[0]
        == rollout(unlike, tokenizer, prompts, 12, 1.0, (0, 0))[0]
    )
    export(policy, tokenizer, str(tmp_path / "out"), "fp32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("rank", [0, 2])
def test_buffers_keep_their_type_and_digits_in_an_export(tmp_path, rank):
    """A router's bias is float32 in every forward, and a buffer may hold integers: neither is rounded to
    bfloat16, so that the folder routes as the trained model did. Parameters are rounded."""
    if rank:
        pytest.importorskip("peft")
    make_policy("deepseek_v3", tmp_path / "policy")
    tokenizer = load_tokenizer(str(tmp_path / "policy"))
    args = SimpleNamespace(
        **vars(ARGS)
        | dict(precision="bf16", lora_rank=rank, lora_alpha=4.0, lora_dropout=0.0, lora_merge=True)
    )
    model = load_model("policy", str(tmp_path / "policy"), tokenizer, args, trained=True)
    bias = next(name for name, _ in model.named_buffers() if name.endswith("e_score_correction_bias"))
    router = model.get_submodule(bias.rpartition(".")[0])
    router.e_score_correction_bias = torch.linspace(0.1, 0.3, len(model.get_buffer(bias)))
    router.register_buffer("seen", torch.tensor([300_001, 7]))
    export(model, tokenizer, str(tmp_path / "out"), "bf16")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[bias], model.get_buffer(bias))
    assert written[bias].dtype == torch.float32
    assert written[bias.replace("e_score_correction_bias", "seen")].tolist() == [300_001, 7]
    others = {tensor.dtype for name, tensor in written.items() if name not in dict(model.named_buffers())}
    assert others == {torch.bfloat16}
