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
from common.positions import longest_of


def load_reference(policy, name: str, tokenizer, args, longest: int):
    """The frozen reference; with LoRA, where --ref-model names no other, the policy with its adapters off.
    `longest`: the tokens of the longest sequence."""
    if args.lora_rank and not args.ref_model:
        return lora.AdapterOff(policy)
    return load_model("policy", name, tokenizer, args, trained=False, longest=longest)


def fingerprint(name: str) -> str:
    """The contents of a model: a hash of its local weights and configuration, or the hub's commit."""
    files = sorted([*Path(name).glob("*.safetensors"), *Path(name).glob("config.json")])
    if not files:
        return f"{name}@{AutoConfig.from_pretrained(name, trust_remote_code=False)._commit_hash}"
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def reference_logprobs(name: str, tokenizer, args, **sets) -> list[torch.Tensor]:
    """log pi_ref(y|x) of the (prompt, response) tokens of each named set: [N] sums over tokens.

    In float64, on every rank. Computed once, before the policy is loaded: the reference is freed at the end.
    The run folder keeps them for --resume, under a key of the tokens, the precision and the reference's
    weights.
    """
    cache = Path(args.run_dir, "reference.npz")
    first = distributed.rank() == 0
    compute, _ = distributed.dtypes(args.precision)
    what = [sets, str(compute), fingerprint(name) if first else ""]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    kept = None
    if first and args.resume and cache.exists():
        with np.load(cache) as stored:
            if str(stored["key"]) == key:
                kept = {each: torch.tensor(stored[each]) for each in sets}
    kept = distributed.all_gather_object(kept)[0]  # rank 0's
    if kept is None:
        kept = {}
        longest = max(longest_of(sequences) for sequences in sets.values())
        reference = load_model("policy", name, tokenizer, args, trained=False, longest=longest)
        for each, sequences in sets.items():
            kept[each] = sequence_logprobs(
                reference, sequences, args.micro_batch_size, tokenizer.pad_token_id
            )
        reference = None
        gc.collect()  # sharded modules are in reference cycles
        if first:
            part = cache.with_suffix(".part.npz")  # under another name first: a kill leaves no half of it
            np.savez(part, key=key, **{each: logprobs.cpu().numpy() for each, logprobs in kept.items()})
            part.rename(cache)
    return [logprobs.to(distributed.device()) for logprobs in kept.values()]
