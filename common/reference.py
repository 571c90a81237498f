"""The frozen reference, and its log-probabilities of a data set, kept in the run folder."""

import gc
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from common import distributed, lora
from common.logprobs import sequence_logprobs
from common.models import load_model


def load_reference(policy, name: str, tokenizer, args):
    """The frozen reference; with LoRA, where --ref-model names no other, the policy itself with its adapters off."""
    own = args.lora_rank and not args.ref_model
    return lora.AdapterOff(policy) if own else load_model("policy", name, tokenizer, args, trained=False)


def fingerprint(name):
    """The contents of a model: a hash of its local weights and configuration, or the hub's commit."""
    files, digest = (
        sorted([*Path(name).glob("*.safetensors"), *Path(name).glob("config.json")]),
        hashlib.sha256(),
    )
    for file in files:
        with open(file, "rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest() if files else f"{name}@{AutoConfig.from_pretrained(name)._commit_hash}"


def reference_logprobs(name, tokenizer, args, **parts):
    """log pi_ref(y|x) of the (prompt, response) tokens of each part: [N] sums over tokens, in float64, on every rank.

    Computed once, before the policy is loaded: the reference is freed at the end. The run folder keeps them for --resume, under
    a key of the tokens, the precision and the reference's weights.
    """
    cache, first = Path(args.run_dir, "reference.npz"), distributed.rank() == 0
    what = [parts, str(distributed.dtypes(args.precision)[0]), fingerprint(name) if first else ""]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    found = dict(np.load(cache)) if first and args.resume and cache.exists() else {}
    kept = {part: torch.tensor(found[part]) for part in parts} if str(found.get("key")) == key else None
    kept = distributed.all_gather_object(kept)[0]
    if kept is None:
        reference, pad = load_model("policy", name, tokenizer, args, trained=False), tokenizer.pad_token_id
        kept = {
            part: sequence_logprobs(reference, s, args.micro_batch_size, pad) for part, s in parts.items()
        }
        reference = None
        gc.collect()  # sharded modules are in reference cycles
        if first:  # under another name first: a kill leaves no half of it
            part = cache.with_suffix(".part.npz")
            np.savez(part, key=key, **{name: x.cpu().numpy() for name, x in kept.items()})
            part.rename(cache)
    return [x.to(distributed.device()) for x in kept.values()]
