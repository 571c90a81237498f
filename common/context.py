"""`--context-pairs`: a value model that first reads how the policy answers other prompts."""

import random


def add_context(
    rows: list[dict], k: int, pool: list[dict], tokenizer, max_pair_length: int, seed: int
) -> list[dict]:
    """Policy conditioning (2502.16944 v1, section 3.2): prefixes each prompt with `k` question-answer pairs that the same
    policy wrote for *other* prompts, drawn from `pool` (rows with `prompt_ids`, `response_ids`, `policy`). A pair is
    cut at `max_pair_length` tokens; where the policy has fewer other prompts than `k`, the prefix is shorter."""
    by_policy, out, bos = {}, [], tokenizer.bos_token_id
    for pair in pool if k else ():
        by_policy.setdefault(pair.get("policy"), []).append(pair)
    for i, row in enumerate(rows):
        rng, others = random.Random(f"{seed}:{i}"), by_policy.get(row.get("policy"), [])
        drawn = [
            pair
            for pair in rng.sample(others, min(len(others), k + 8))
            if pair["prompt_ids"] != row["prompt_ids"]
        ]
        parts = [(pair["prompt_ids"] + pair["response_ids"])[:max_pair_length] for pair in drawn[:k]] + [
            row["prompt_ids"]
        ]
        ids = parts[0] + [
            t for p in parts[1:] for t in (p[1:] if p[0] == bos != tokenizer.eos_token_id else p)
        ]  # one BOS
        out.append({**row, "prompt_ids": ids})
    return out
