"""LoRA through peft (2106.09685): adapters inside the Hugging Face model, merged for the export."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

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
    of a value or reward model. `name`: the folder or hub id that the export names as its base. Ends with one
    line where there is no linear layer."""
    import peft

    linear = [path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    if not linear:
        fail(f"{name}: --lora-rank: it has no torch.nn.Linear layers to put adapters on")
    config = peft.LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        base_model_name_or_path=name,
        target_modules=sorted({path.rpartition(".")[2] for path in linear}),
    )
    peft.inject_adapter_in_model(config, model)  # and freezes the rest
    model.lora = config
    model.lora_merge = args.lora_merge
    if model.can_generate():
        config.task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    else:
        config.task_type = "TOKEN_CLS" if "TokenClassification" in type(model).__name__ else "SEQ_CLS"
        head.requires_grad_(True)
        config.modules_to_save = [path for path, m in model.named_modules() if m is head]
    replace_dropout(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(master if parameter.requires_grad else parameter.dtype)


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
        model.save_pretrained(folder, state_dict={key: value.to(compute) for key, value in weights})
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
