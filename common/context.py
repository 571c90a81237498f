"""`--context-pairs`: a value model that first reads how the policy answers other prompts."""

import random


def add_context(
    rows: list[dict], k: int, pool: list[dict], tokenizer, max_pair_length: int, seed: int
) -> list[dict]:
    """Policy conditioning (2502.16944 v1, section 3.2): `k` question-answer pairs before each prompt.

    The pairs are those of the same policy to *other* prompts, drawn from `pool` (rows with `prompt_ids`,
    `response_ids`, `policy`). A pair is cut at `max_pair_length` tokens; where the policy has fewer other
    prompts than `k`, the prefix is shorter. The draw depends on `seed` and a row's place alone.
    """
    by_policy = {}
    if k:
        for pair in pool:
            by_policy.setdefault(pair.get("policy"), []).append(pair)
    out = []
    for i, row in enumerate(rows):
        rng = random.Random(f"{seed}:{i}")
        candidates = by_policy.get(row.get("policy"), [])
        drawn = rng.sample(candidates, min(len(candidates), k + 8))  # 8 more: some may be to this very prompt
        others = [pair for pair in drawn if pair["prompt_ids"] != row["prompt_ids"]]
        texts = [(pair["prompt_ids"] + pair["response_ids"])[:max_pair_length] for pair in others[:k]]
        texts.append(row["prompt_ids"])
        out.append({**row, "prompt_ids": join_texts(texts, tokenizer)})
    return out


def join_texts(texts: list[list[int]], tokenizer) -> list[int]:
    """Token lists one after the other, with the first one's BOS alone. A tokenizer whose BOS is its eos keeps
    them all: there the first token of a text may as well be an end."""
    bos = tokenizer.bos_token_id
    ids = list(texts[0])
    for text in texts[1:]:
        begins_with_bos = text[0] == bos and bos != tokenizer.eos_token_id
        ids += text[1:] if begins_with_bos else text
    return ids
