"""Opening a model of a kind in the ecosystem's own class: checked, with its head, sharded."""

import types
import warnings

import torch
import transformers

from common import distributed, lora, sharding, t5, value_heads
from common.cli import fail, note
from common.logprobs import response_logprobs
from common.pretrained import load_pretrained
from common.tokenization import stop_token

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # what a load leaves out is checked below, and said in one line
warnings.filterwarnings(
    "ignore", message="FSDP2-wrapped module .* returned a view"
)  # nothing here writes in place


AUTO = {
    "policy": transformers.AutoModelForCausalLM,
    "encoder-decoder": transformers.AutoModelForSeq2SeqLM,  # a policy of the T5 family
    "value": transformers.AutoModelForTokenClassification,  # a linear hidden -> 1 on every token
    "reward": transformers.AutoModelForSequenceClassification,  # the same on the last token
    "prompt value": transformers.AutoModelForTokenClassification,  # read at the prompt alone, so it may be an encoder
}


def check_unread(name: str, kind: str, keys, cut: bool) -> None:
    """Weights of a folder that the model has no place for, by their names `keys`, are not left out in silence. An output layer
    is what a value model leaves behind of a policy; a policy from a value model is a mistake. `cut`: to the first layers."""
    heads = {key for key in keys if key.split(".")[0] in ("lm_head", "score", "classifier")}
    judging = sorted(key for key in heads if not key.startswith("lm_head"))
    if judging and kind in ("policy", "encoder-decoder"):
        fail(f"{name}: a value or reward model (it has {judging[0]}), no {kind}")
    rest = sorted(set(keys) - heads)
    if rest and not cut:
        note(
            f"{name}: {len(rest)} of its weights have no place in a {kind} model and are not read, {rest[0]} for one"
        )


def load_model(kind: str, name: str, tokenizer, args, *, trained: bool, layers: int = 0):
    """A sharded policy, value or reward model, dropout off, head zero-initialised where the folder has none.
    Rank 0 reads the weights (safetensors only, no remote code), the others receive their shard. Trained models keep
    float32 master weights, frozen ones the compute type, and no gradient. `layers` keeps the first N of them."""
    compute, master = distributed.dtypes(args.precision)
    config = load_pretrained("configuration", transformers.AutoConfig, name)
    for key, value in vars(config).items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)  # log-probabilities are of the distribution that was sampled
    scaled = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    if kind == "policy" and any(getattr(config, key, None) for key in scaled):
        fail(
            f"{name}: it scales or caps its logits after the output layer, which the chunked log-probabilities do not do"
        )
    kind = t5.checked(config, kind, name) if config.is_encoder_decoder else kind
    if kind not in ("policy", "encoder-decoder"):
        config.num_labels, config.classifier_dropout = 1, 0.0
        if (
            trained or config.pad_token_id is None
        ):  # a reward model from the hub is read where its own config says
            config.pad_token_id = tokenizer.pad_token_id
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    adapted = trained and bool(args.lora_rank)
    options = dict(config=config, dtype=master if trained and not adapted else compute)
    if hasattr(config, "relative_attention_num_buckets"):
        options["attn_implementation"] = (
            "eager"  # T5's position bias: fused kernels differ with and without gradient
        )
    source = None
    if distributed.rank() == 0:
        options_of_rank_0 = dict(use_safetensors=True, output_loading_info=True, **options)
        source, info = load_pretrained(f"{kind} weights", AUTO[kind], name, **options_of_rank_0)
        missing = {key for key in info["missing_keys"] if not key.endswith("inv_freq")}
        wrong = sorted(key for key in missing if key.split(".")[0] not in ("score", "classifier"))
        if wrong:
            fail(f"{name}: weights missing for a {kind} model: {wrong[0]}")
        if missing and not trained:
            fail(
                f"{name}: it has no head that was trained ({min(missing)} is missing), so it is no {kind} model"
            )
        check_unread(name, kind, info["unexpected_keys"], cut=bool(layers))
        for key, parameter in source.named_parameters():
            if key in missing:
                torch.nn.init.zeros_(parameter)
        if kind == "value" and getattr(
            config, "score_std", None
        ):  # from reward.py: start at its *standardised* scores
            value_heads.head(source).weight.data.div_(config.score_std)
            value_heads.head(source).bias.data.sub_(config.score_mean).div_(config.score_std)
            config.score_std = None  # done
    with torch.device("meta"):
        model = AUTO[kind].from_config(**options)
    for module in filter(None, (source, model)):
        if "value" in kind:
            value_heads.head(module).to(
                master
            )  # a value in bfloat16 has 3 digits: the head computes in full precision
        if adapted:
            head = module.get_output_embeddings() if module.can_generate() else value_heads.head(module)
            lora.add(module, head, name, args, master)
    if model.can_generate():  # registered with FSDP below, so that calling it gathers the root's parameters
        model.response_logprobs = types.MethodType(response_logprobs, model)
        pad = tokenizer.pad_token_id
        stops = sorted({tokenizer.eos_token_id, stop_token(tokenizer)})
        model.forbidden_token = None if pad in stops else pad
        model.compute_dtype = compute  # by which rollouts judge what is rounding
        if source:  # for the export: a rollout reads nothing of it, least of all a repetition penalty
            model.generation_config = source.generation_config
            model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
            if (
                not model.generation_config.do_sample
            ):  # a changed config is only saved without what it would not use
                model.generation_config.update(temperature=None, top_p=None, top_k=None)
    sharding.shard(model, compute, args.shard_size, frozen=not trained)
    sharding.load_full(model, source)
    if not adapted:  # else the adapters are, and a head
        model.requires_grad_(trained)
    if trained and args.gradient_checkpointing:
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )  # transformers < 5.20: so
        enable({"use_reentrant": False})
    return model.train(trained)
