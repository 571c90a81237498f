"""Every model family of transformers, tiny: right, or refused in one line.

python tests/families.py llama qwen3      # the verdicts of these
python tests/families.py --write          # of all, into families.json and the table of docs/models.md
"""

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch
import torch.distributed as dist
import transformers
from random_models import sample_sequences
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from assets import reviews
from common import value_heads
from common.batches import collate
from common.checkpoints import export
from common.models import load_model
from common.rollout import check_sampler, rollout
from common.tokenization import load_tokenizer, stop_tokens
from common.value_heads import response_values, sequence_scores

transformers.utils.logging.set_verbosity(60)

ARGS = SimpleNamespace(
    precision="fp32",
    shard_size=0,
    gradient_checkpointing=False,
    micro_batch_size=3,
    ref_model="",
    lora_rank=0,
    lora_alpha=4.0,
    lora_dropout=0.0,
    lora_merge=True,
)
# Popular multimodal types that are in neither mapping of model_types().
VISION = (
    "qwen2_5_vl",
    "qwen3_vl",
    "mistral3",
    "llava",
    "smolvlm",
    "glm4v",
    "internvl",
    "paligemma",
    "idefics3",
)

# What a configuration's sizes become, by the name of the entry, in every configuration and those inside it.
# An entry that is None by default stays None, but for HEADS.
SIZES = {
    # the width of the stream of hidden states; vision and audio towers get the same
    32: "hidden_size d_model n_embd emb_dim embed_dim embedding_size input_embedding_size output_embedding_size "
    "backbone_hidden_size lru_width out_hidden_size attention_hidden_size hidden_size_global "
    "vision_output_dim projection_dim projector_hidden_size audio_hidden_size",
    # feed-forward layers
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner dff dim_ff feed_forward_size "
    "ffn_hidden_size intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size",
    16: "index_n_heads indexer_n_heads "  # so many that no two scores of an indexer are equal, which is a draw
    "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size q_lora_rank kv_lora_rank "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size "
    "router_hidden_size lambda_rank",
    # heads
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
    "linear_num_value_heads linear_num_heads rotary_dim qk_rope_head_dim num_experts num_local_experts "
    "n_routed_experts moe_num_experts index_topk index_block_size global_block_size block_multiple_of "
    "laurel_rank gated_norm_rank hc_lowrank loop_gate_rank d_rel indexer_budget",
    8: "head_dim dim_head d_kv d_head kv_channels attention_head_size swa_head_dim query_pre_attn_scalar "
    "qk_nope_head_dim v_head_dim o_lora_rank index_head_dim indexer_head_dim linear_key_head_dim "
    "linear_value_head_dim linear_head_dim state_size ssm_state_size mamba_d_state mamba_n_heads mamba_num_heads "
    "mamba_head_dim chunk_size mamba_chunk_size block_size hidden_size_per_layer_input "
    # windows, so small that they matter
    "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size local_attention "
    "attention_window",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads o_groups "
    "n_mamba_heads n_groups index_topk_blocks "
    # layers
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers depth "
    # experts of a token
    "num_experts_per_tok moe_k moe_topk top_k_experts moe_top_k",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group zero_expert_num "
    "first_k_dense_replace num_dense_layers",
    12: "qk_head_dim",
    7: "local_radius",
    64: "mamba_d_ssm expert_capacity",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
    "context_length original_max_position_embeddings max_encoder_position_embeddings "
    "max_decoder_position_embeddings",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
HEADS = ("head_dim", "num_key_value_heads")  # None: derived from the rest, by some models only later
VOCABULARIES = (
    "vocab_size",
    "vocab_size_per_layer_input",
    "src_vocab_size",
    "tgt_vocab_size",
    "decoder_vocab_size",
    "unpadded_vocab_size",
)
# Scales and caps that many a configuration leaves at 1 or off, but not every checkpoint does.
SCALES = {
    "initializer_range": 0.3,
    "init_std": 0.3,
    "embed_init_std": 0.3,
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0,
    "attn_logit_softcapping": 5.0,
    "logit_scale": 0.5,
    "logits_scaling": 0.5,
    "lm_head_multiplier": 0.5,
    "logits_mup_width_multiplier": 2.0,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.5,
    "attention_in_multiplier": 0.5,
    "attention_out_multiplier": 0.5,
    "key_multiplier": 0.5,
    "ssm_in_multiplier": 0.5,
    "ssm_out_multiplier": 0.5,
    "router_jitter_noise": 0.1,
    "input_jitter_noise": 0.1,
    "moe_jitter_eps": 0.1,
    "moe_token_dropout": 0.1,
    "layerdrop": 0.1,
    "encoder_layerdrop": 0.1,
    "decoder_layerdrop": 0.1,
}
PINNED = Path(__file__).with_name("families.json")
PAGE = Path(__file__).resolve().parents[1] / "docs/models.md"
BEGIN = "<!-- families -->"
END = "<!-- /families -->"
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HYBRID = 4  # layers where there are several kinds of them

SLIDING = ["sliding_attention", "full_attention"] * 2
# model type -> entries that the rule above gets wrong, and why
EXCEPTIONS = {
    # the default has no layer that attends
    "bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": HYBRID},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "num_hidden_layers": HYBRID,
        "position_embedding_type": "rope",
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": HYBRID},
    # derived layers
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "dory": {"num_hidden_layers": HYBRID, "n_input_layers": 1, "n_output_layers": 1, "layer_types": SLIDING},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": SLIDING, "num_hidden_layers": HYBRID},
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "layer_types": SLIDING,
        "num_hidden_layers": HYBRID,
        "global_head_dim": 16,
    },
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "num_hidden_layers": HYBRID,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": None,
        },
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffllama": {"attention_dropout": 0.0},
    "mamba2": {"num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {},
    "xmod": {"default_language": "en_XX"},
    "longcat_flash": {"head_dim": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 100,
        "heads_per_ngram": 2,
        "split_ngram_parts": 4,
        "make_ngram_vocab_size_divisible_by": 4,
    },
    "dbrx": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "minicpm3": {"dim_model_base": 16},
    "roc_bert": {
        "pronunciation_vocab_size": 53,
        "shape_vocab_size": 53,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "reformer": {"is_decoder": True},
    # the parts that hear: small
    "vibevoice_acoustic_tokenizer_encoder": {
        "num_filters": 2,
        "depths": [1] * 7,
        "downsampling_ratios": [2] * 6,
    },
    "granite_speech_encoder": {"hidden_dim": 32},
    "granite_speech_plus_encoder": {"hidden_dim": 32},
    "phi4_multimodal_audio": {"num_blocks": 2},
    "blt": {"encoder_hash_byte_group_vocab": 64},
}


def default_of(field):
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def tiny_entries(default, vocabulary: int) -> dict:
    """The entries of a small configuration of the kind of `default`, a configuration with its class's own sizes."""
    cls = type(default)
    depth = next((vars(default)[name] for name in LAYERS if isinstance(vars(default).get(name), int)), None)
    entries = {}
    kinds = {}  # entry -> the kinds of layers it names, one per layer
    for field in dataclasses.fields(cls):
        name = field.name
        given = default_of(field)
        now = vars(default).get(name)
        if name in cls.sub_configs:
            if now is not None:
                entries[name] = tiny_entries(now, vocabulary)
        elif name in SPECIAL:
            entries[name] = SPECIAL[name]
        elif (
            isinstance(now, list | tuple)
            and len(now) == depth
            and all(isinstance(x, str) for x in now)
            and len(set(now)) > 1
        ):
            kinds[name] = list(dict.fromkeys(now))
        elif name in SIZE_OF and not isinstance(given, bool) and (isinstance(given, int) or name in HEADS):
            entries[name] = SIZE_OF[name]
        elif name in VOCABULARIES:
            entries[name] = vocabulary
        elif name in SCALES:
            entries[name] = SCALES[name]
        elif ("dropout" in name or "pdrop" in name) and isinstance(given, float):
            entries[name] = 0.1
    if "kv_lora_rank" in entries and "num_key_value_heads" in entries:
        entries["num_key_value_heads"] = entries["num_attention_heads"]  # latent attention has a key per head
    for name, names in kinds.items():
        order = [names[i % len(names)] for i in range(HYBRID)]
        entries[name] = sorted(order, key=names.index) if "mlp" in name else order
    if kinds:
        entries.update((name, HYBRID) for name in LAYERS if name in entries)
    entries.update(EXCEPTIONS.get(cls.model_type, {}))
    return {"model_type": cls.model_type, **entries}


# --- tiny models --------------------------------------------------------------------------------------------

PAD, BOS, EOS = (reviews.SPECIAL.index(f"<{role}>") for role in ("pad", "bos", "eos"))
SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
POLICY_CLASSES = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
)


def model_types() -> list[str]:
    """Every model type that transformers opens as a causal language model or as an encoder-decoder, and VISION."""
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    names |= set(VISION) & set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return sorted(names)


def policy_class(config):
    """transformers' class that opens such a policy."""
    kind = config.model_type
    if config.is_encoder_decoder and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForSeq2SeqLM
    return next(auto for auto, names in POLICY_CLASSES if kind in names)


def tiny_config(kind: str, vocabulary: int):
    """A small configuration of a model type."""
    cls = CONFIG_MAPPING[kind]
    entries = tiny_entries(cls(), vocabulary)
    entries.pop("model_type")
    config = cls(**entries)
    if not 0 <= (getattr(config, "decoder_start_token_id", None) or -1) < vocabulary:
        config.decoder_start_token_id = PAD  # as the T5 family has it
    return config


@torch.no_grad()
def disturb(model) -> None:
    """Biases, norms and whatever else begins as a constant get values that are all different."""
    stored = set(model.state_dict())
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in stored)]
    for _, tensor in tensors:
        if tensor.is_floating_point() and (tensor.ndim < 2 or tensor.numel() > 1 and tensor.std() == 0):
            tensor.add_(0.1 * torch.randn_like(tensor))


def save(model, tokenizer, folder) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_policy(kind: str, folder, seed: int = 0):
    """(folder of a random policy, its tokenizer), with a stop token that its first greedy response soon says."""
    tokenizer = load_tokenizer(reviews.folder("untrained"))
    tokenizer.chat_template = None
    torch.manual_seed(seed)
    config = tiny_config(kind, len(tokenizer))
    model = policy_class(config).from_config(config, dtype=torch.float32).eval()
    disturb(model)
    layer = model.get_output_embeddings()
    with torch.no_grad():
        if layer is not None and getattr(layer, "weight", None) is not None:
            # the pad token would be a popular one, were it not forbidden
            layer.weight[PAD] = 2 * layer.weight[10]
        response = []
        for _ in range(2):
            logits = plain_logits(model, PROMPTS[0], response + [3])[-1]
            logits[:10] = -math.inf  # none of the special tokens
            response.append(int(logits.argmax()))
    stop = response[1]
    tokenizer.eos_token = reviews.WORDS[stop]
    for part in (model.config, model.config.get_text_config(), model.generation_config):
        if hasattr(part, "eos_token_id"):
            part.eos_token_id = stop
    return save(model, tokenizer, folder), tokenizer


def make_reward(kind: str, folder, tokenizer, seed: int = 0) -> str:
    """The folder of a random reward model, as transformers has one."""
    torch.manual_seed(seed)
    config = tiny_config(kind, len(tokenizer))
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    disturb(model)
    return save(model, tokenizer, folder)


# --- plain transformers, one sequence at a time -------------------------------------------------------------


def open_plain(auto, folder):
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def plain_logits(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """[T, V]: the logits before each response token."""
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        shifted = torch.tensor([[start, *response[:-1]]])
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=shifted).logits[0]
    return model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]


def plain_logprobs(model, prompt, response, temperature=1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability of each response token, the logits before it), pad excluded."""
    logits = plain_logits(model, prompt, response).double() / temperature
    logits = logits.index_fill(1, torch.tensor([PAD]), -math.inf)
    return logits.log_softmax(-1)[range(len(response)), response], logits


# --- what must be right --------------------------------------------------------------------------------------


class Wrong(Exception):
    """The code under test went through, with something that is not what plain transformers says."""


def require_near(what: str, mine: torch.Tensor, theirs: torch.Tensor, limit: float) -> None:
    off = (mine.detach().double() - theirs.detach().double()).abs().max().item()
    if not off <= limit:  # nor NaN
        raise Wrong(f"{what} off by {off:.2g}")


def require_near_gradients(what: str, mine, theirs) -> None:
    """Each parameter of `theirs` with a gradient has the same in `mine`."""
    own = dict(mine.named_parameters())
    found = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None and p.grad.any()}
    largest = max(grad.abs().max() for grad in found.values())
    for name, grad in found.items():
        if name not in own:
            raise Wrong(f"{what}: no parameter {name}")
        if own[name].grad is None:
            raise Wrong(f"{what}: none in {name}")
        scale = max(grad.abs().max(), 1e-2 * largest).item()
        require_near(f"{what} of {name}", own[name].grad / scale, grad / scale, 1e-3)


PROMPTS = [p for p, _ in sample_sequences(seed=1, sizes=((3, 1), (9, 1), (6, 1)))]
SEQUENCES = sample_sequences(seed=2, sizes=((3, 5), (9, 4), (1, 3), (6, 1)))


def check_policy(case) -> None:
    folder, tokenizer = case.folder, case.tokenizer
    policy = load_model("policy", folder, tokenizer, ARGS, trained=True)
    reference = open_plain(policy_class(policy.config), folder)
    prompt, response = SEQUENCES[0]
    with torch.no_grad():
        ahead = plain_logits(reference, prompt, response)[:1]
        require_near(
            "not refused, though it reads later tokens: logits",
            plain_logits(reference, prompt, response[:1]),
            ahead,
            1e-3,
        )
    check_logprobs(policy, reference)
    check_sampler(policy, tokenizer, PROMPTS, 6, 1.0)  # as all scripts do first
    check_rollout(policy, tokenizer, reference)
    check_export(policy, tokenizer, reference, f"{folder}-export")


def check_logprobs(policy, reference, limit=2e-4) -> None:
    """Of a ragged batch, in train mode, and their gradients."""
    logprobs, _ = policy.response_logprobs(**collate(SEQUENCES, PAD, "cpu"))
    logprobs.sum().backward()
    total = 0.0
    for row, (prompt, response) in zip(logprobs, SEQUENCES, strict=True):
        expected, _ = plain_logprobs(reference, prompt, response)
        total = total + expected.sum()
        require_near("log-probabilities", row[: len(response)], expected, limit)
        if row[len(response) :].any():
            raise Wrong("log-probabilities after the end")
    try:
        total.backward()
    except RuntimeError:
        return  # transformers' own class cannot be trained (RWKV)
    require_near_gradients("gradients", policy, reference)


@torch.no_grad()
def check_rollout(policy, tokenizer, reference) -> None:
    """Greedy and sampled, in one batch: each token is what plain transformers says after those before it."""
    prompts = PROMPTS * 2
    temperatures = [0.0] * len(PROMPTS) + [1.0] * (len(PROMPTS) - 1) + [0.7]
    length = 6
    responses, sampled = rollout(policy, tokenizer, prompts, length, temperatures, (0, 0))
    for prompt, response, heat, mine in zip(prompts, responses, temperatures, sampled, strict=True):
        stops = [t for t, token in enumerate(response) if token in stop_tokens(tokenizer)]
        if stops not in ([], [len(response) - 1]) or (not stops and len(response) < length):
            raise Wrong(f"a response of {len(response)} tokens ends at {stops}")
        expected, logits = plain_logprobs(reference, prompt, response, heat or 1.0)
        require_near("sampled log-probabilities", mine[: len(response)], expected, 1e-3)
        if heat == 0:
            chosen = logits[range(len(response)), response]
            require_near("greedy tokens: logits", chosen, logits.amax(1), 1e-3)


@torch.no_grad()
def check_export(policy, tokenizer, reference, folder: str) -> None:
    """What was trained is what plain transformers opens."""
    for model in (policy, reference):
        for parameter in model.parameters():
            parameter.mul_(1.01)
    export(policy, tokenizer, folder, "fp32")
    again = open_plain(policy_class(policy.config), folder)
    for prompt, response in SEQUENCES[:2]:
        logits = plain_logits(reference, prompt, response)
        require_near("logits of the export", plain_logits(again, prompt, response), logits, 1e-4)


def check_value(case) -> None:
    folder, tokenizer = case.folder, case.tokenizer
    model = load_model("value", folder, tokenizer, ARGS, trained=True)
    head = value_heads.head(model)
    disturb_head(head)
    values = response_values(model, **collate(SEQUENCES, PAD, "cpu"))
    if not values.requires_grad or not torch.isfinite(values).all():
        raise Wrong("values without a gradient, or not finite")
    ((values - 1) ** 2).sum().backward()
    if not all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()):
        raise Wrong("gradients of values are not finite")
    if not head.weight.grad.any():
        raise Wrong("no gradient in the head")
    export(model, tokenizer, f"{folder}-value", "fp32")
    outputs = outputs_of(
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        AutoModelForTokenClassification,
        case,
        f"{folder}-value",
        head,
    )
    with torch.no_grad():
        again = load_model("value", f"{folder}-value", tokenizer, ARGS, trained=False)
        for row, (prompt, response) in zip(values, SEQUENCES, strict=True):
            mine = row[: len(response) + 1]
            one = response_values(model, **collate([(prompt, response)], PAD, "cpu"))[0]
            require_near("values padded and alone", mine, one, 2e-4)
            start = response_values(model, **collate([(prompt, response[:1])], PAD, "cpu"))[0]
            require_near("values of a part of the response", mine[:2], start, 2e-4)
            expected = outputs(prompt + response)[len(prompt) - 1 :]
            require_near("values", mine, expected, 2e-4)
            reopened = response_values(again, **collate([(prompt, response)], PAD, "cpu"))[0]
            require_near("values of the export", reopened, one, 1e-4)


@torch.no_grad()
def disturb_head(head) -> None:
    torch.manual_seed(5)
    head.weight.normal_()
    if head.bias is not None:
        head.bias.fill_(0.7)


def outputs_of(names, auto, case, folder, head):
    """A function of one sequence: the output at each of its tokens by plain transformers. Where it has a class for
    the head, that opens `folder`; else the policy's hidden states through the linear layer `head`."""
    if AutoConfig.from_pretrained(folder).model_type in names:
        plain = open_plain(auto, folder)
        return lambda tokens: plain(input_ids=torch.tensor([tokens])).logits[0].squeeze(-1)
    policy = open_plain(policy_class(AutoConfig.from_pretrained(case.folder)), case.folder)
    base = policy.base_model if policy.base_model is not policy else policy.model

    def outputs(tokens):
        hidden = base(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        return torch.nn.functional.linear(hidden, head.weight, head.bias).squeeze(-1)

    return outputs


def check_reward(case) -> None:
    names = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    tokenizer = case.tokenizer
    head = None
    if case.kind in names:
        folder = make_reward(case.kind, f"{case.folder}-reward", tokenizer)
    else:
        folder = f"{case.folder}-reward"
        trained = load_model("reward", case.folder, tokenizer, ARGS, trained=True)
        head = value_heads.head(trained)
        disturb_head(head)
        export(trained, tokenizer, folder, "fp32")
    model = load_model("reward", folder, tokenizer, ARGS, trained=False)
    outputs = outputs_of(names, AutoModelForSequenceClassification, case, folder, head)
    sequences = [(prompt, [*response, tokenizer.eos_token_id]) for prompt, response in SEQUENCES]
    with torch.no_grad():
        scores = sequence_scores(model, **collate(sequences, PAD, "cpu"))[:, 0]
        for score, (prompt, response) in zip(scores, sequences, strict=True):
            one = sequence_scores(model, **collate([(prompt, response)], PAD, "cpu"))[0, 0]
            require_near("scores padded and alone", score, one, 1e-4)
            found = outputs(prompt + response)
            require_near("scores", score, found[-1] if found.ndim else found, 1e-4)
    if scores.std() < 1e-3:
        raise Wrong("scores are all the same")


def check_lora(case) -> None:
    """Trained, sampled and merged right. An adapter whose layer is not called stays zero: an expert to which no
    token is sent, or a layer whose weight is read past it."""
    folder, tokenizer = case.folder, case.tokenizer
    args = SimpleNamespace(**vars(ARGS) | {"lora_rank": 2})
    policy = load_model("policy", folder, tokenizer, args, trained=True)
    check_sampler(policy, tokenizer, PROMPTS, 6, 1.0)
    batch = collate(SEQUENCES, PAD, "cpu")
    called = []
    hooks = [
        module.lora_B["default"].register_forward_hook(lambda module, *_: called.append(module))
        for module in policy.modules()
        if hasattr(module, "lora_B")
    ]
    with torch.no_grad():
        before, _ = policy.response_logprobs(**batch)
        for hook in hooks:
            hook.remove()
        for module in set(called):
            module.weight.normal_(0, 0.3)
    logprobs, _ = policy.response_logprobs(**batch)
    logprobs.sum().backward()
    reference = open_plain(policy_class(policy.config), folder)
    sum(plain_logprobs(reference, *sequence)[0].sum() for sequence in SEQUENCES).backward()
    for name, module in policy.named_modules():
        if module in called and (module.weight.grad is None or not module.weight.grad.any()):
            layer = reference.get_submodule(name.partition(".lora_B")[0])
            if layer.weight.grad is not None and layer.weight.grad.any():
                raise Wrong(f"no gradient in {name}")
    if not all(p.grad is None or p.grad.isfinite().all() for p in policy.parameters()):
        raise Wrong("gradients of adapters are not finite")
    if (logprobs - before).abs().max() < 1e-2:
        raise Wrong("the adapters change nothing")
    export(policy, tokenizer, f"{folder}-lora", "fp32")
    again = open_plain(policy_class(policy.config), f"{folder}-lora")
    with torch.no_grad():
        for row, (prompt, response) in zip(logprobs, SEQUENCES, strict=True):
            expected, _ = plain_logprobs(again, prompt, response)
            require_near("log-probabilities of the merged export", row[: len(response)], expected, 1e-3)


# --- verdicts ------------------------------------------------------------------------------------------------

COLUMNS = {"policy": check_policy, "value": check_value, "reward": check_reward, "lora": check_lora}


def verdict(check, case, verbose=False) -> str:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            check(case)
        return "right"
    except SystemExit as end:
        text = str(end).removeprefix("error: ")
        if "\n" in text:
            return f"WRONG: refused in more than one line: {text!r}"
        if case.folder not in text and case.kind not in text:
            return f"WRONG: refused without a name: {text}"
        return "refused: " + text.replace(f"{case.folder}-reward: ", "").replace(f"{case.folder}: ", "")
    except Wrong as wrong:
        return f"WRONG: {wrong}"
    except Exception as error:
        if verbose:
            traceback.print_exc()
        return f"TRACEBACK: {type(error).__name__}: {' '.join(str(error).split())[:150]}"


def verdicts(kind: str, root, verbose=False) -> dict[str, str]:
    """Column -> verdict, of one model type."""
    folder = f"{root}/{kind}"
    try:
        folder, tokenizer = make_policy(kind, folder)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        reason = f"not built: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
        return dict.fromkeys(COLUMNS, reason)
    case = SimpleNamespace(kind=kind, folder=folder, tokenizer=tokenizer)
    return {column: verdict(check, case, verbose) for column, check in COLUMNS.items()}


def pinned(text: str) -> str:
    """A verdict without what may differ elsewhere: measured numbers, versions."""
    text = re.sub(
        r"; transformers [0-9.]+ is installed, requirements.txt has the version that is tested", "", text
    )
    return re.sub(r"\d+\.\d+(e-?\d+)?|\b\d+e-\d+", "N", text)


def table(found: dict[str, dict[str, str]]) -> str:
    """The table of docs/models.md, of {model type: {column: verdict}}: with the first refusal's reason."""
    lines = [
        "| family | policy | value | reward | LoRA | why not |",
        "|---|---|---|---|---|---|",
    ]
    for kind, verdicts_of_kind in sorted(found.items()):
        words = [text.partition(":")[0] for text in verdicts_of_kind.values()]
        reasons = [text.partition(": ")[2] for text in verdicts_of_kind.values() if text != "right"]
        why = reasons[0].replace("|", "\\|") if reasons else ""
        lines.append(f"| {' | '.join([f'`{kind}`', *words, why])} |")
    right = {column: sum(each[column] == "right" for each in found.values()) for column in COLUMNS}
    counts = ", ".join(f"{count} as {column}" for column, count in right.items())
    return f"Of {len(found)} families are right: {counts}.\n\n" + "\n".join(lines) + "\n"


def page_with(table: str, page: str) -> str:
    """docs/models.md with the table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; none: all")
    parser.add_argument("--verbose", action="store_true", help="tracebacks in full")
    parser.add_argument(
        "--write", action="store_true", help="of all types, into families.json and docs/models.md"
    )
    args = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    written = {}
    with tempfile.TemporaryDirectory() as root:
        for kind in args.types or model_types():
            start = time.time()
            found = verdicts(kind, root, args.verbose)
            print(f"{kind} ({time.time() - start:.1f} s)")
            for column, text in found.items():
                print(f"    {column:7} {text}", flush=True)
            written[kind] = {column: pinned(text) for column, text in found.items()}
    if args.write:
        PINNED.write_text(json.dumps(written, indent=1) + "\n")
        PAGE.write_text(page_with(table(written), PAGE.read_text()))
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
