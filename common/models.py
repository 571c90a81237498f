"""Opening a model of a kind in the ecosystem's own class: checked, with its head, sharded.

A model and a tokenizer stay what the libraries made them. What this project has to remember of one is an
attribute that it sets on the object. These are all of them:

    model.response_logprobs   logprobs.response_logprobs as a method of a policy.
                              Set by load_model; called by scripts, logprobs, rollout and lora.
    model.output_form         how a policy's logits come from its last hidden state: a logprobs.OutputForm.
                              Set by checks.check_policy; read by logprobs.
    model.forbidden_tokens    the tokens that a policy must not sample, or None: see checks.forbidden_tokens.
                              Set by load_model and checks.check_policy; read by logprobs, rollout and vllm.
    model.pads_prompts        False where prompts of different lengths cannot be sampled in one batch.
                              Set and read by rollout (check_sampler, sample_all).
    model.needs_mask          whether a reward model has to be told what is padding.
                              Set by checks.check_head; read by value_heads.sequence_scores.
    model.needs_types         whether it has to be told where the response begins.
                              Set by rewards.Reward; read by value_heads.sequence_scores.
    model.compute_dtype       the type in which a model computes: what is rounding, and what is not.
                              Set by load_model; read by checks and rollout.
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
    tokenizer.template_arguments  what --template-arguments gives the chat template.
                              Set by templates.prepare; read by templates.render.
    tokenizer.generation_ends ends of an answer that the model's generation config names.
                              Set by tokenization.load_tokenizer; read by tokenization.stop_tokens.
    tokenizer.embeddings      how many tokens its model knows, None where its configuration does not say.
                              Set by tokenization.load_tokenizer; read by tokenization.embedded.
    tokenizer.of_encoder_decoder   whether its model is one.
                              Set by tokenization.load_tokenizer; read by tokenization.encode_prompt.
"""

import types
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from common import checks, distributed, lora, positions, sharding, t5, value_heads
from common.cli import fail, note
from common.logprobs import OutputForm, response_logprobs
from common.pretrained import load_pretrained
from common.tokenization import special_tokens, stop_tokens

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
# transformers' names for the head of a value or reward model
HEADS = ("score", "classifier")
# transformers' parts for a class that it does not have: the base model and a linear layer, `score`
GENERIC = {
    "value": GenericForTokenClassification,
    "prompt value": GenericForTokenClassification,
    "reward": GenericForSequenceClassification,
}


def load_model(kind: str, name: str, tokenizer, args, *, trained: bool, layers: int = 0, longest: int = 0):
    """A sharded policy, value or reward model (a `kind` of AUTO) from a folder or hub id, without dropout.

    Rank 0 reads the weights (safetensors only, no remote code), the others receive their shard. A head that
    the folder of a trained model lacks starts at zero. Trained models keep float32 master weights; frozen
    ones keep the compute type and get no gradient. `layers` keeps the first N of them (0: all). `longest`: the
    tokens of the longest sequence that it will read. The model is compared with its own forward once
    (common/checks.py). Ends with one line where the folder is no such model, or one that cannot be used.
    """
    compute, master = distributed.dtypes(args.precision)
    config = open_config(kind, name)
    check_architecture(config, kind, name, trained)
    kind = kind_to_open(config, kind, name)
    adjust_config(config, kind, name, tokenizer, trained, layers)
    auto = class_to_open(config, kind, name)
    adapted = trained and bool(args.lora_rank)
    options = {"config": config, "dtype": master if trained and not adapted else compute}
    if hasattr(config, "relative_attention_num_buckets"):
        # T5's position bias: the fused kernels differ with and without gradient
        options["attn_implementation"] = "eager"

    what = f"{name}: a {config.model_type} model cannot be opened as a {kind} model"
    source = None  # the whole model with its weights, on rank 0
    with checks.one_line(what):
        with torch.device("meta"):
            model = auto.from_config(**options)  # no weights yet: they come by shards
        positions.check(model, name, longest)
        if distributed.rank() == 0:
            source = read_weights(auto, kind, name, options, trained, cut=bool(layers))
            if kind == "value":
                standardise_head(source, config)
        distributed.wait_for_rank_0()  # it may download for hours
        for module in (source, model):
            if module is not None:
                prepare_modules(module, kind, name, args, master, adapted)
        model.compute_dtype = compute
        if kind in POLICIES:
            prepare_policy(model, source, tokenizer, name)
        sharding.shard(model, compute, args.shard_size, frozen=not trained)
        sharding.load_full(model, source)
    if not adapted:  # with LoRA, the adapters and a head alone are trained: lora.add has said so
        model.requires_grad_(trained)
    if trained and args.gradient_checkpointing:
        with checks.one_line(f"{name}: --gradient-checkpointing"):
            checkpoint_activations(model)
    model.train(trained)
    if kind in POLICIES:
        checks.check_policy(model, name, tokenizer)
    else:
        checks.check_head(model, kind, name, tokenizer)
    return model


def open_config(kind: str, name: str):
    """The model's configuration, of text alone where transformers opens the model as text; without anything
    random, in the parts inside it either: log-probabilities are of the distribution that was sampled."""
    config = load_pretrained("configuration", transformers.AutoConfig, name)
    text = config.get_text_config()
    policies = transformers.AutoModelForCausalLM._model_mapping
    both = type(config) in policies and type(text) in policies
    if both and policies[type(config)] is policies[type(text)]:
        config = text
    remove_randomness(config)
    return config


def check_architecture(config, kind: str, name: str, trained: bool) -> None:
    """Ends with one line where a folder says of itself that it holds a model of another kind: not all have weights
    that say so. A value model may begin as a reward model, and either as a policy."""
    said = getattr(config, "architectures", None)
    said = said[0] if isinstance(said, list) and said and isinstance(said[0], str) else ""
    value = said.endswith("ForTokenClassification")
    reward = said.endswith("ForSequenceClassification")
    if kind in POLICIES and (value or reward):
        fail(f"{name}: a value or reward model ({said} by its config.json), no policy")
    if kind == "reward" and value and not trained:
        fail(f"{name}: a value model ({said} by its config.json), no reward model")
    if kind in VALUES and reward and not trained:
        fail(f"{name}: a reward model ({said} by its config.json), no value model")


def remove_randomness(config) -> None:
    """In place: no dropout, and no layers that are dropped."""
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            remove_randomness(value)
        elif isinstance(value, float) and "drop" in key:
            setattr(config, key, 0.0)


def kind_to_open(config, kind: str, name: str) -> str:
    """The key of AUTO. Ends with one line where such a model cannot be used."""
    if config.is_encoder_decoder:
        return t5.checked(config, kind, name)
    return kind


def adjust_config(config, kind: str, name: str, tokenizer, trained: bool, layers: int) -> None:
    """In place: the one output of value and reward models, where they are read, the number of layers."""
    text = config.get_text_config()
    words = text.vocab_size
    if tokenizer.pad_token_id >= words:
        fail(
            f"{name}: the tokenizer's pad token {tokenizer.pad_token!r} is number {tokenizer.pad_token_id}, and "
            f"the model has {words} embeddings: resize them, or take a pad token that the model has"
        )
    special = special_tokens(tokenizer)  # those of pictures may lie beyond: `tokenization.embedded` looks
    plain = max((token for token in tokenizer.get_vocab().values() if token not in special), default=0)
    if plain >= words:
        fail(
            f"{name}: the tokenizer has tokens up to {plain}, and the model has {words} embeddings: it is another "
            "model's tokenizer, or the embeddings have to be resized"
        )
    if kind not in POLICIES:
        config.num_labels = 1
        config.classifier_dropout = 0.0
        # A frozen reward model from the hub is read where its own config says: before *its* padding.
        if trained or text.pad_token_id is None:
            text.pad_token_id = tokenizer.pad_token_id
        elif not 0 <= text.pad_token_id < words:
            fail(
                f"{name}: pad_token_id {text.pad_token_id} of its config.json is none of its {words} tokens; "
                "write there the token that its texts are padded with"
            )
    if not layers:
        return
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):  # one entry per layer
        text.layer_types = text.layer_types[:layers]


def class_to_open(config, kind: str, name: str):
    """What has `from_pretrained` and `from_config` for such a model: transformers' Auto class, or a class made
    here where transformers has no such head for this family.

    It is made of transformers' own parts, the base model and a linear layer, with the name that transformers
    would give it; docs/models.md has the lines that open its folder with plain transformers. Ends with one
    line where there is no base model.
    """
    auto = AUTO[kind]
    if type(config) in auto._model_mapping:
        return auto
    bases = transformers.AutoModel._model_mapping
    if kind in POLICIES or type(config) not in bases:
        fail(f"{name}: transformers opens no {config.model_type} model as a {kind} model ({auto.__name__})")
    base = bases[type(config)]
    pretrained = next(each for each in base.__mro__ if each.__name__.endswith("PreTrainedModel"))
    generic = GENERIC[kind]
    class_name = base.__name__.removesuffix("Model") + generic.__name__.removeprefix("Generic")
    parts = {
        "config_class": type(config),
        "__module__": pretrained.__module__,  # in whose file transformers looks what the class can do
        "base_model_prefix": prefix_in_policy(config, base) or pretrained.base_model_prefix,
        "from_config": classmethod(from_config),
    }
    return type(class_name, (generic, pretrained), parts)


def prefix_in_policy(config, base) -> str | None:
    """Under which name a policy of this family holds its base model, and so the names of its weights."""
    policies = transformers.AutoModelForCausalLM
    if type(config) not in policies._model_mapping:
        return None
    with torch.device("meta"):
        policy = policies.from_config(config)
    return next((name for name, child in policy.named_children() if type(child) is base), None)


def from_config(cls, config, **options):
    """As the Auto classes have it: a model of class `cls` without weights."""
    return cls._from_config(config, **options)


def read_weights(auto, kind: str, name: str, options: dict, trained: bool, cut: bool):
    """The whole model with the folder's weights; a head that the folder lacks is zero.

    `cut`: only the first layers are opened. Ends with one line where other weights are missing, or the head
    of a model that is not to be trained.
    """
    source, info = load_pretrained(
        f"{kind} weights",
        auto,
        name,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # named below
        **options,
    )
    check_sizes(name, kind, info["mismatched_keys"])
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
    check_numbers(source, name)
    return source


def check_sizes(name: str, kind: str, mismatched: Iterable) -> None:
    """Ends with one line where weights of a folder have another size than the model's."""
    for key, of_folder, of_model in sorted(mismatched):
        if kind not in POLICIES and key.split(".")[0] in HEADS:
            fail(f"{name}: its head has {of_folder[0]} labels, and a {kind} model has one number")
        fail(f"{name}: {key} is {list(of_folder)} in its weights and {list(of_model)} by its config.json")


def check_numbers(source, name: str) -> None:
    """Ends with one line where a weight is not finite, or is stored as whole numbers, as in a quantised model,
    whose configuration does not say so. A hub id's types are not looked at."""
    parameters = dict(source.named_parameters())
    for key, parameter in parameters.items():
        total = parameter.detach().sum(dtype=torch.promote_types(parameter.dtype, torch.float32))
        # a sum takes a fraction of the time of isfinite, and is finite where all are, but for the largest numbers
        if not bool(total.isfinite()) and not bool(parameter.isfinite().all()):
            fail(f"{name}: its weight {key} is not finite")
    if getattr(source.config, "quantization_config", None):
        return
    for file in sorted(Path(name).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for key in sorted(parameters.keys() & weights.keys()):
                type_of_file = weights.get_slice(key).get_dtype()
                if type_of_file == "BOOL" or type_of_file[0] in "IU":
                    fail(f"{name}: its weight {key} is of type {type_of_file}, which no weight is")


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


def to_reward_unit(model) -> None:
    """Changes the head of a value model from gvm_td.py, in place, so that its values are in the unit of the
    reward: value * return_std + return_mean. Other models stay as they are."""
    config = model.config
    mean = getattr(config, "return_mean", None)
    std = getattr(config, "return_std", None)
    if mean is None or std is None:
        return
    sharding.reshard(model)
    layer = value_heads.head(model)
    layer.weight.data.mul_(std)
    layer.bias.data.mul_(std).add_(mean)
    config.return_mean = None  # done: the export, with this config, is not to be changed once more
    config.return_std = None


def prepare_modules(module, kind: str, name: str, args, master: torch.dtype, adapted: bool) -> None:
    """What changes the modules: the same for rank 0's model and for the one that gets its weights."""
    if kind in VALUES:
        value_heads.head(module).to(master)  # a bfloat16 has 3 digits: the head computes in full precision
    if adapted:
        head = module.get_output_embeddings() if kind in POLICIES else value_heads.head(module)
        lora.add(module, head, name, args, master)


def prepare_policy(model, source, tokenizer, name: str) -> None:
    """What a policy needs beside its weights; `source` is rank 0's, None elsewhere."""
    # FSDP gathers the root's parameters (the output layer among them) around calls of the module's own
    # methods alone. So this function has to be one of them: `sharding.shard` registers it by name.
    model.response_logprobs = types.MethodType(response_logprobs, model)
    layer = checks.output_layer(model, name)
    model.output_form = OutputForm()
    model.forbidden_tokens = checks.forbidden_tokens(model, tokenizer, layer.weight.shape[0])
    if source is not None:
        model.generation_config = exported_generation(source, tokenizer, name)


def exported_generation(source, tokenizer, name: str):
    """The generation config for the export: a rollout reads nothing of it, least of all a repetition penalty.

    transformers opens settings that it would not save again, so they are tried here, before the training.
    """
    generation = source.generation_config
    stops = stop_tokens(tokenizer)
    generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    # transformers saves a changed config only without settings that it would not use
    if not generation.do_sample:
        generation.update(temperature=None, top_p=None, top_k=None)
    try:
        generation.validate(strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        note(
            f"{name}: the export gets the tokens of its generation_config.json alone; transformers: {reason}"
        )
        ids = {key: value for key, value in generation.to_dict().items() if key.endswith("token_id")}
        generation = transformers.GenerationConfig(**ids)
    return generation


def checkpoint_activations(model) -> None:
    """Activations are computed again in the backward pass instead of kept."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # its name before transformers 5.20
        model.gradient_checkpointing_enable({"use_reentrant": False})
