"""Scores of texts by the field's own libraries, each imported where it is used: ROUGE-L, BLEU, METEOR, BERTScore, toxicity.
docs/evaluate_responses.md has their formulas and what they do not see."""

import importlib.metadata
import importlib.util
import json
import math
import statistics
from pathlib import Path

import transformers

from common import distributed
from common.cli import fail

PACKAGES = {"rouge_l": "rouge-score", "bleu": "sacrebleu", "meteor": "nltk", "bertscore": "bert-score"}
WITH_REFERENCE = tuple(PACKAGES)


def check(names, args) -> None:
    """Stops in one line where a metric lacks its package, dictionary or model: before any text is generated."""
    for name in set(names) & set(PACKAGES):
        if not importlib.util.find_spec(PACKAGES[name].replace("-", "_")):
            fail(f"--metrics {name} needs the package: pip install {PACKAGES[name]}")
    if "meteor" in names:
        from nltk.corpus import wordnet

        try:
            wordnet.ensure_loaded()
        except (LookupError, OSError):  # OSError: an incomplete one
            fail("--metrics meteor needs WordNet for its synonyms: python -m nltk.downloader wordnet")
    if "bertscore" in names:
        bertscore_layer(args)
    if "toxicity" in names:
        labels = list(_config(args.toxicity_model, "--toxicity-model").id2label.values())
        if args.toxicity_label not in labels:
            fail(
                f"--toxicity-label {args.toxicity_label}: the labels of {args.toxicity_model} are {', '.join(labels)}"
            )


def _config(name: str, flag: str):
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        fail(f"{flag} {name}: no such folder or hub id ({str(error).splitlines()[0]})")


def mean(values, by: str = "") -> dict:
    """Mean with its normal 95 % interval, 1.96 standard errors either side (None for one value); `by`: what computed it."""
    values = [float(value) for value in values]
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "ci95": half, "n": len(values)} | ({"by": by} if by else {})


def _version(name: str) -> str:
    return f"{PACKAGES[name]} {importlib.metadata.version(PACKAGES[name])}"


def _limit(tokenizer) -> None:
    """512 tokens where a tokenizer names no limit of its own: encoders have no more positions, and bert-score passes on 10^30."""
    tokenizer.model_max_length = tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else 512


def rouge_l(texts, references, args):
    """F1 of the longest common subsequence of words (Lin 2004), no stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, texts, strict=True)
    return mean(
        [scorer.score(*pair)["rougeL"].fmeasure for pair in pairs], f"{_version('rouge_l')}, F1, no stemming"
    )


def bleu(texts, references, args):
    """Corpus BLEU, 0 to 100; the interval is sacrebleu's own, from 1,000 bootstrap samples."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    score = metric.corpus_score(texts, [references], n_bootstrap=1000)
    found = json.loads(score.format(width=6, is_json=True, signature=str(metric.get_signature())))
    return {
        "mean": score.score,
        "ci95": found.get("confidence_var"),
        "n": len(texts),
        "by": found["signature"],
    }


def meteor(texts, references, args):
    """METEOR (Banerjee and Lavie 2005) with nltk's parameters; matches words, stems, then WordNet's synonyms."""
    from nltk.tokenize import wordpunct_tokenize  # unlike word_tokenize it needs no download
    from nltk.translate.meteor_score import single_meteor_score

    pairs = [
        (wordpunct_tokenize(reference), wordpunct_tokenize(text))
        for reference, text in zip(references, texts, strict=True)
    ]
    return mean([single_meteor_score(*pair) for pair in pairs], f"{_version('meteor')}, wordpunct_tokenize")


def bertscore_layer(args) -> int:
    """--bertscore-layer, or the layer that bert-score's authors tuned for a model of that name (a folder's last part counts)."""
    from bert_score.utils import model2layers

    depth = getattr(_config(args.bertscore_model, "--bertscore-model"), "num_hidden_layers", 0)
    name = Path(args.bertscore_model).name
    known = {key.rpartition("/")[2]: layer for key, layer in model2layers.items()}
    layer = args.bertscore_layer or model2layers.get(args.bertscore_model) or known.get(name)
    if layer is None:
        fail(
            f"--bertscore-model {name}: bert-score has no tuned layer for it; choose one of 1 to {depth} with --bertscore-layer"
        )
    if not 0 < layer <= depth:
        fail(f"--bertscore-layer {layer}: {args.bertscore_model} has the layers 1 to {depth}")
    return layer


def bertscore(texts, references, args):
    """F1 of greedily matched contextual embeddings (1904.09675), raw: neither idf weights nor the baseline's rescaling."""
    from bert_score import BERTScorer

    layer = bertscore_layer(args)
    options = dict(
        num_layers=layer,
        batch_size=args.micro_batch_size,
        device=str(distributed.device()),
        use_fast_tokenizer=True,
    )
    scorer = BERTScorer(args.bertscore_model, **options)
    if isinstance(scorer._tokenizer, (transformers.RobertaTokenizer, transformers.GPT2Tokenizer)):
        # the space before the first word that bert-score asks `encode` for, which transformers 5 no longer heeds there
        scorer._tokenizer = transformers.AutoTokenizer.from_pretrained(
            args.bertscore_model, add_prefix_space=True
        )
    _limit(scorer._tokenizer)
    scores = [0.0] * len(texts)  # of an empty text: bert-score 0.3.13 cannot encode it with transformers 5
    some = [
        i for i, pair in enumerate(zip(texts, references, strict=True)) if all(text.strip() for text in pair)
    ]
    if some:
        found = scorer.score([texts[i] for i in some], [references[i] for i in some])[2]
        for i, score in zip(some, found.tolist(), strict=True):
            scores[i] = score
    return mean(
        scores, f"{_version('bertscore')}, {args.bertscore_model} layer {layer}, F1, no idf, not rescaled"
    )


def toxicity(texts, references, args):
    """Probability that a classifier gives --toxicity-label; sigmoid or softmax as its configuration says."""
    where = dict(
        device=distributed.device(), model_kwargs=dict(use_safetensors=True), batch_size=args.micro_batch_size
    )
    classify = transformers.pipeline("text-classification", model=args.toxicity_model, **where)
    _limit(classify.tokenizer)
    found = classify(list(texts), top_k=None, truncation=True)
    scores = [label["score"] for labels in found for label in labels if label["label"] == args.toxicity_label]
    return mean(scores, f"{args.toxicity_model}, label {args.toxicity_label}")


METRICS = {"rouge_l": rouge_l, "bleu": bleu, "meteor": meteor, "bertscore": bertscore, "toxicity": toxicity}
