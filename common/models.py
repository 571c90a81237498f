"""Opening a model of a kind in the ecosystem's own class: checked, with its head, sharded.

A model and a tokenizer stay what the libraries made them. What this project has to remember of one is an
attribute that it sets on the object. These are all of them:

    model.response_logprobs   logprobs.response_logprobs as a method of a policy.
                              Set by load_model; called by scripts, logprobs, rollout and lora.
    model.forbidden_token     the pad token, which a policy must not sample, or None where pad is a stop.
                              Set by load_model; read by logprobs, rollout and vllm.
    model.compute_dtype       the type in which a policy computes: what is rounding, and what is not.
                              Set by load_model; read by rollout.
    model.frozen              whether it is not trained.
                              Set by sharding.shard; read by sharding, offload, rollout and tools/plan_memory.py.
    model.lora                peft's configuration; only a model with adapters has it.
                              Set by lora.add; read by lora, checkpoints and vllm.
    model.lora_merge          whether its export merges the adapters into the weights.
                              Set by lora.add; read by lora.save.
    model.parked              where its weights wait on the host; only a parked model has it.
                              Set by offload.park; read by offload.on_device.
    model.engine              vLLM's engine, or None for the loop in rollout.
                              Set by the online scripts; read by rollout.
    tokenizer.of_encoder_decoder   whether its model is one.
                              Set by tokenization.load_tokenizer; read by tokenization.encode_prompt.
"""

import types
import warnings
from collections.abc import Iterable

import torch
import transformers

from common import distributed, lora, sharding, t5, value_heads
from common.cli import fail, note
from common.logprobs import response_logprobs
from common.pretrained import load_pretrained
from common.tokenization import stop_token

transformers.utils.logging.disable_progress_bar()
# What a load leaves out is checked below, and said in one line.
transformers.utils.logging.set_verbosity_error()
# A view may be written to in place, which FSDP warns of; nothing here does so.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


AUTO = {
    "policy": transformers.AutoModelForCausalLM,
    "encoder-decoder": transformers.AutoModelForSeq2SeqLM,  # a policy of the T5 family
    "value": transformers.AutoModelForTokenClassification,  # a linear hidden -> 1 on every token
    "reward": transformers.AutoModelForSequenceClassification,  # the same on the last token
    # read at the prompt alone, so it may be an encoder
    "prompt value": transformers.AutoModelForTokenClassification,
}
POLICIES = ("policy", "encoder-decoder")
VALUES = ("value", "prompt value")
HEADS = ("score", "classifier")  # transformers' names for the head of a value or reward model

# Configuration entries by which some models scale or cap their logits after the output layer.
LOGIT_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def load_model(kind: str, name: str, tokenizer, args, *, trained: bool, layers: int = 0):
    """A sharded policy, value or reward model (a `kind` of AUTO) from a folder or hub id, without dropout.

    Rank 0 reads the weights (safetensors only, no remote code), the others receive their shard. A head that
    the folder of a trained model lacks starts at zero. Trained models keep float32 master weights; frozen
    ones keep the compute type and get no gradient. `layers` keeps the first N of them (0: all). Ends with one
    line where the folder is no such model.
    """
    compute, master = distributed.dtypes(args.precision)
    config = open_config(name)
    kind = kind_to_open(config, kind, name)
    adjust_config(config, kind, tokenizer, trained, layers)
    adapted = trained and bool(args.lora_rank)
    options = {"config": config, "dtype": master if trained and not adapted else compute}
    if hasattr(config, "relative_attention_num_buckets"):
        # T5's position bias: the fused kernels differ with and without gradient
        options["attn_implementation"] = "eager"

    source = None  # the whole model with its weights, on rank 0
    if distributed.rank() == 0:
        source = read_weights(kind, name, options, trained, cut=bool(layers))
        if kind == "value":
            standardise_head(source, config)
    with torch.device("meta"):
        model = AUTO[kind].from_config(**options)  # no weights yet: they come by shards
    for module in (source, model):
        if module is not None:
            prepare_modules(module, kind, name, args, master, adapted)
    if model.can_generate():
        prepare_policy(model, source, tokenizer, compute)

    sharding.shard(model, compute, args.shard_size, frozen=not trained)
    sharding.load_full(model, source)
    if not adapted:  # with LoRA, the adapters and a head alone are trained: lora.add has said so
        model.requires_grad_(trained)
    if trained and args.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train(trained)


def open_config(name: str):
    """The model's configuration, without dropout: log-probabilities are of the distribution that was
    sampled."""
    config = load_pretrained("configuration", transformers.AutoConfig, name)
    for key, value in vars(config).items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def kind_to_open(config, kind: str, name: str) -> str:
    """The key of AUTO. Ends with one line where such a model cannot be used."""
    if kind == "policy" and any(getattr(config, key, None) for key in LOGIT_SCALES):
        fail(
            f"{name}: it scales or caps its logits after the output layer, "
            "which the chunked log-probabilities do not do"
        )
    if config.is_encoder_decoder:
        return t5.checked(config, kind, name)
    return kind


def adjust_config(config, kind: str, tokenizer, trained: bool, layers: int) -> None:
    """In place: the one output of value and reward models, where they are read, the number of layers."""
    if kind not in POLICIES:
        config.num_labels = 1
        config.classifier_dropout = 0.0
        # A frozen reward model from the hub is read where its own config says: before *its* padding.
        if trained or config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):  # one entry per layer
        config.layer_types = config.layer_types[: config.num_hidden_layers]


def read_weights(kind: str, name: str, options: dict, trained: bool, cut: bool):
    """The whole model with the folder's weights; a head that the folder lacks is zero.

    `cut`: only the first layers are opened. Ends with one line where other weights are missing, or the head
    of a model that is not to be trained.
    """
    source, info = load_pretrained(
        f"{kind} weights", AUTO[kind], name, use_safetensors=True, output_loading_info=True, **options
    )
    # rotary frequencies are computed, not stored
    missing = {key for key in info["missing_keys"] if not key.endswith("inv_freq")}
    wrong = sorted(key for key in missing if key.split(".")[0] not in HEADS)
    if wrong:
        fail(f"{name}: weights missing for a {kind} model: {wrong[0]}")
    if missing and not trained:
        fail(f"{name}: it has no head that was trained ({min(missing)} is missing), so it is no {kind} model")
    check_unread(name, kind, info["unexpected_keys"], cut)
    for key, parameter in source.named_parameters():
        if key in missing:
            torch.nn.init.zeros_(parameter)
    return source


def check_unread(name: str, kind: str, keys: Iterable[str], cut: bool) -> None:
    """Weights of a folder that the model has no place for, by their names `keys`, are named.

    An output layer is what a value model leaves behind of a policy; a policy from a value model is a mistake.
    `cut`: to the first layers, so that later ones are expected to be unread.
    """
    heads = {key for key in keys if key.split(".")[0] in ("lm_head", *HEADS)}
    judging = sorted(key for key in heads if not key.startswith("lm_head"))
    if judging and kind in POLICIES:
        fail(f"{name}: a value or reward model (it has {judging[0]}), no {kind}")
    rest = sorted(set(keys) - heads)
    if rest and not cut:
        note(
            f"{name}: {len(rest)} of its weights have no place in a {kind} model and are not read, "
            f"{rest[0]} for one"
        )


def standardise_head(source, config) -> None:
    """A value model from reward.py's folder starts at its *standardised* score: (score - mean) / std."""
    if getattr(config, "score_std", None):
        layer = value_heads.head(source)
        layer.weight.data.div_(config.score_std)
        layer.bias.data.sub_(config.score_mean).div_(config.score_std)
        config.score_std = None  # done: the export, with this config, is not to be standardised once more


def prepare_modules(module, kind: str, name: str, args, master: torch.dtype, adapted: bool) -> None:
    """What changes the modules: the same for rank 0's model and for the one that gets its weights."""
    if kind in VALUES:
        value_heads.head(module).to(master)  # a bfloat16 has 3 digits: the head computes in full precision
    if adapted:
        head = module.get_output_embeddings() if module.can_generate() else value_heads.head(module)
        lora.add(module, head, name, args, master)


def prepare_policy(model, source, tokenizer, compute: torch.dtype) -> None:
    """What a policy needs beside its weights; `source` is rank 0's, None elsewhere."""
    # FSDP gathers the root's parameters (the output layer among them) around calls of the module's own
    # methods alone. So this function has to be one of them: `sharding.shard` registers it by name.
    model.response_logprobs = types.MethodType(response_logprobs, model)
    pad = tokenizer.pad_token_id
    stops = sorted({tokenizer.eos_token_id, stop_token(tokenizer)})
    model.forbidden_token = None if pad in stops else pad
    model.compute_dtype = compute
    if source is None:
        return
    # For the export: a rollout reads nothing of it, least of all a repetition penalty.
    generation = source.generation_config
    generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    # transformers saves a changed config only without settings that it would not use
    if not generation.do_sample:
        generation.update(temperature=None, top_p=None, top_k=None)
    model.generation_config = generation


def checkpoint_activations(model) -> None:
    """Activations are computed again in the backward pass instead of kept."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # its name before transformers 5.20
        model.gradient_checkpointing_enable({"use_reentrant": False})
