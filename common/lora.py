"""LoRA through peft (2106.09685): adapters inside the Hugging Face model, merged for the export."""

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from common import sharding
from common.cli import fail


class Dropout(torch.nn.Dropout):
    """On where gradients are: in the update; not in rollouts, nor in old and reference log-probabilities."""

    def forward(self, x):
        return torch.nn.functional.dropout(x, self.p, torch.is_grad_enabled())


def find_package(args) -> None:
    """Ends with one line where --lora-rank is given and peft is not installed."""
    if args.lora_rank and not importlib.util.find_spec("peft"):
        fail("--lora-rank needs the package: pip install peft")


def check(args, before: dict, now: dict) -> None:
    """Ends with one line where a resumed run began with other adapters: its checkpoint holds them alone."""
    if not args.resume or not (args.lora_rank or before["lora_rank"]):
        return
    for key in ("model", "lora_rank", "lora_alpha"):
        if before[key] != now[key]:
            began = f"the run in {args.run_dir} began with {before[key]}"
            fail(f"{key} is {now[key]}, but {began}; resume with that")


def add(model, head, name: str, args, master: torch.dtype) -> None:
    """Adapters on every linear layer but `head`, in place. They alone are trained, in `master`, and the head
    of a value or reward model. `name`: the folder or hub id that the export names as its base.

    The experts of a mixture are one tensor in most models, no linear layers, and get none. Ends with one line
    where there is no linear layer, or peft puts adapters elsewhere.
    """
    import peft

    paths = linear_layers(model, head)
    if not paths:
        fail(f"{name}: --lora-rank: it has no torch.nn.Linear layers to put adapters on")
    config = peft.LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        base_model_name_or_path=name,
        target_modules=paths,
    )
    if not args.lora_merge and renames_targets(config, model):
        fail(
            f"{name}: --no-lora-merge: peft would open such adapters of a {model.config.model_type} model as "
            "adapters of its experts; leave --lora-merge"
        )
    with without_renaming(model):
        peft.inject_adapter_in_model(config, model)  # and freezes the rest
    adapted = sorted(path for path, module in model.named_modules() if hasattr(module, "lora_A"))
    if adapted != paths:
        wrong = sorted(set(adapted) ^ set(paths))
        fail(f"{name}: --lora-rank: peft does not put its adapters on the linear layers alone ({wrong[0]})")
    model.lora = config
    model.lora_merge = args.lora_merge
    if "ForTokenClassification" in type(model).__name__:
        config.task_type = "TOKEN_CLS"
    elif "ForSequenceClassification" in type(model).__name__:
        config.task_type = "SEQ_CLS"
    else:
        config.task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    if config.task_type in ("TOKEN_CLS", "SEQ_CLS"):
        head.requires_grad_(True)
        config.modules_to_save = [path for path, m in model.named_modules() if m is head]
    replace_dropout(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(master if parameter.requires_grad else parameter.dtype)


# Mamba's fused kernels read the weights of these layers, beside its conv1d, themselves: past an adapter.
READ_BY_KERNELS = ("x_proj", "dt_proj", "out_proj")


def linear_layers(model, head) -> list[str]:
    """The paths of the linear layers but `head`, sorted; of a model of text and pictures, those of the text.

    Not of layers that only derive from torch's (routers, which give more than one tensor), nor of
    READ_BY_KERNELS.
    """
    is_text = model.config.get_text_config() is model.config
    text = model if is_text or model.config.is_encoder_decoder else model.get_decoder()
    of_text = {id(module) for module in text.modules()}
    paths = []
    for path, module in model.named_modules():
        if type(module) is not torch.nn.Linear or module is head or id(module) not in of_text:
            continue
        parent, _, last = path.rpartition(".")
        if not (last in READ_BY_KERNELS and hasattr(model.get_submodule(parent), "conv1d")):
            paths.append(path)
    return sorted(paths)


def renames_targets(config, model) -> bool:
    """Whether peft, when it opens such adapters, takes their layers for the experts' of older versions."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # versions that rename nothing
        return False
    other = copy.deepcopy(config)
    convert_peft_config_for_transformers(other, model=model, conversions=None)
    return set(other.target_modules) != set(config.target_modules)


@contextmanager
def without_renaming(model):
    """Inside, peft does not know the model's family: of some it would put what is meant for shared experts
    (gate_proj, up_proj, down_proj) on the fused ones."""
    kind = type(model.config).model_type
    model.config.model_type = "unknown"
    try:
        yield
    finally:
        model.config.model_type = kind


def replace_dropout(model) -> None:
    """Ours instead of torch's, which peft has put into its layers: torch's is on in train mode, and the
    policy is in that mode when its old log-probabilities are computed, too."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is torch.nn.Dropout:
                setattr(module, name, Dropout(child.p))


class AdapterOff:
    """The reference of a policy with adapters: the same weights with the adapters off, no second copy."""

    def __init__(self, policy):
        self.policy = policy
        self.config = policy.config
        self.frozen = True
        self.layers = [module for module in policy.modules() if hasattr(module, "lora_A")]

    def parameters(self):
        """None of its own."""
        return iter(())

    def response_logprobs(self, **mb) -> list[torch.Tensor]:
        """`logprobs.response_logprobs` of the policy without its adapters."""
        # not by peft's enable_adapters(): it would also switch requires_grad, which FSDP reads once
        for layer in self.layers:
            layer._disable_adapters = True
        try:
            return self.policy.response_logprobs(**mb)
        finally:
            for layer in self.layers:
                layer._disable_adapters = False


def merged(full: dict[str, torch.Tensor], scale: float) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the base model, W + scale B A) one by one, from a whole state dict with adapters."""
    for key, value in full.items():
        stem, adapted, _ = key.rpartition(".base_layer.")
        if adapted and key.endswith("weight"):
            a = full[f"{stem}.lora_A.default.weight"]
            b = full[f"{stem}.lora_B.default.weight"]
            value = (value.to(b.dtype) + scale * b @ a).to(value.dtype)
        if ".lora_" not in key:
            yield key.replace(".base_layer.", "."), value


def save(model, full: dict[str, torch.Tensor], folder: Path, compute: torch.dtype) -> None:
    """The merged model, or with --no-lora-merge the adapters alone; `full` is the whole state dict."""
    if model.lora_merge:
        weights = merged(full, model.lora.lora_alpha / model.lora.r)
        model.save_pretrained(folder, state_dict=sharding.in_type(compute, model, weights))
    else:
        folder.mkdir()
        save_adapter(model, full, folder)


def save_adapter(model, full: dict[str, torch.Tensor], folder: Path) -> None:
    """The adapters (and a trained head) as peft opens them; the model's config, with our entries, too."""
    heads = model.lora.modules_to_save or ()
    weights = {}
    for key, value in full.items():
        if ".lora_" in key or key.rpartition(".")[0] in heads:
            weights[f"base_model.model.{key.replace('.default.', '.')}"] = value
    save_file(weights, folder / "adapter_model.safetensors")
    model.lora.save_pretrained(folder)
    model.config.to_json_file(folder / "model_config.json")
