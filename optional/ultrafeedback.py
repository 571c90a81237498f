"""openbmb/UltraFeedback's own nesting, the data of both papers, as rows of ours."""


def rows(row: dict, kind: str) -> list[dict]:
    """One of its rows holds `completions`, each with `response`, `overall_score`, `model`."""
    names, prompt = {"response": "response", "reward": "overall_score", "policy": "model"}, {"prompt": row["instruction"]}
    scored = [prompt | {ours: c.get(name) for ours, name in names.items()} for c in row["completions"]]
    if kind in ("scored", "responses"):
        return scored
    rated = sorted((r for r in scored if isinstance(r["reward"], (int, float))), key=lambda r: r["reward"])
    if kind != "preference" or not rated:
        return rated[-1:]
    sides = {"chosen": rated[-1], "rejected": rated[0]}  # the best against the worst; ties teach nothing
    pair = prompt | {s: r["response"] for s, r in sides.items()} | {f"{s}_policy": r["policy"] for s, r in sides.items()}
    return [pair] if rated[0]["reward"] < rated[-1]["reward"] else []
