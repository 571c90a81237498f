"""Scores of texts by the field's own libraries: ROUGE-L, BLEU, METEOR, BERTScore, toxicity.

Each library is imported where it is used. docs/evaluate_responses.md has the formulas and what they do not
see. A metric is a function `metric(texts, references, args, questions)` of equally long lists (toxicity
reads no references); it returns what `mean` returns, or the same keys."""

import importlib.metadata
import importlib.util
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import transformers

from common import distributed
from common.cli import fail

PACKAGES = {"rouge_l": "rouge-score", "bleu": "sacrebleu", "meteor": "nltk", "bertscore": "bert-score"}
WITH_REFERENCE = tuple(PACKAGES)


def check(names: tuple[str, ...], args) -> None:
    """Stops in one line where a metric lacks its package, dictionary or model: before any text is generated.
    `args`: the flags of `evaluate.py responses`, as in all functions here."""
    for name in set(names) & set(PACKAGES):
        module = PACKAGES[name].replace("-", "_")
        if not importlib.util.find_spec(module):
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
        config = _config(args.toxicity_model, "--toxicity-model")
        labels = list(config.id2label.values())
        if args.toxicity_label not in labels:
            known = f"the labels of {args.toxicity_model} are {', '.join(labels)}"
            fail(f"--toxicity-label {args.toxicity_label}: {known}")


def _config(name: str, flag: str):
    """The configuration of the model that `flag` names. Ends the run where there is none."""
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"{flag} {name}: no such folder or hub id ({str(error).splitlines()[0]})")


def mean(values: Iterable[float], by: str = "", questions: list[int] | None = None) -> dict:
    """Mean with its normal 95 % interval, 1.96 standard errors on either side (None for one question), and
    the number of values.

    `by`: what computed them. `questions`: the number of each value's question; values of one question are
    not independent (Cameron and Miller 2015, section II: cluster-robust, with G / (G - 1)). By default each
    value has its own.
    """
    values = [float(value) for value in values]
    if questions is None:
        questions = range(len(values))
    center = statistics.fmean(values)
    sums = {}  # question -> sum of the distances of its values from the mean
    for question, value in zip(questions, values, strict=True):
        sums[question] = sums.get(question, 0.0) + value - center
    half = None
    count = len(sums)
    if count > 1:
        squares = sum(total**2 for total in sums.values())
        half = 1.96 * math.sqrt(squares * count / (count - 1)) / len(values)
    found = {"mean": center, "ci95": half, "n": len(values)}
    if by:
        found["by"] = by
    return found


def _version(name: str) -> str:
    """The package of a metric and its version."""
    package = PACKAGES[name]
    return f"{package} {importlib.metadata.version(package)}"


def _limit(tokenizer) -> None:
    """512 tokens where a tokenizer names no limit of its own: encoders have no more positions, and
    bert-score passes on 10^30."""
    if tokenizer.model_max_length >= 10**6:
        tokenizer.model_max_length = 512


def rouge_l(texts: list[str], references: list[str], args, questions: list[int] | None = None) -> dict:
    """F1 of the longest common subsequence of words (Lin 2004), no stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = []
    for reference, text in zip(references, texts, strict=True):
        scores.append(scorer.score(reference, text)["rougeL"].fmeasure)
    return mean(scores, f"{_version('rouge_l')}, F1, no stemming", questions)


def bleu(texts: list[str], references: list[str], args, questions: list[int] | None = None) -> dict:
    """Corpus BLEU, 0 to 100; the interval is sacrebleu's own, from 1,000 bootstrap samples of the texts. It
    would be too narrow for several texts of one question: there is none then."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    score = metric.corpus_score(texts, [references], n_bootstrap=1000)
    signature = str(metric.get_signature())
    # The interval is found in the JSON form alone.
    found = json.loads(score.format(width=6, is_json=True, signature=signature))
    interval = found.get("confidence_var")
    if questions is not None and len(set(questions)) < len(texts):
        interval = None
    return {
        "mean": score.score,
        "ci95": interval,
        "n": len(texts),
        "by": found["signature"],
    }


def meteor(texts: list[str], references: list[str], args, questions: list[int] | None = None) -> dict:
    """METEOR (Banerjee and Lavie 2005) with nltk's parameters. It matches words, then stems, then synonyms
    from WordNet."""
    from nltk.tokenize import wordpunct_tokenize  # unlike word_tokenize it needs no download
    from nltk.translate.meteor_score import single_meteor_score

    scores = []
    for reference, text in zip(references, texts, strict=True):
        reference_words = wordpunct_tokenize(reference)
        words = wordpunct_tokenize(text)
        scores.append(single_meteor_score(reference_words, words))
    return mean(scores, f"{_version('meteor')}, wordpunct_tokenize", questions)


def bertscore_layer(args) -> int:
    """--bertscore-layer, or the layer that bert-score's authors tuned for a model of that name (of a folder
    the last part counts). Ends the run where there is no such layer."""
    from bert_score.utils import model2layers

    config = _config(args.bertscore_model, "--bertscore-model")
    depth = getattr(config, "num_hidden_layers", 0)
    name = Path(args.bertscore_model).name
    layer_by_name = {key.rpartition("/")[2]: layer for key, layer in model2layers.items()}
    layer = args.bertscore_layer
    if not layer:
        layer = model2layers.get(args.bertscore_model)
    if not layer:
        layer = layer_by_name.get(name)
    if layer is None:
        choose = f"choose one of 1 to {depth} with --bertscore-layer"
        fail(f"--bertscore-model {name}: bert-score has no tuned layer for it; {choose}")
    if not 0 < layer <= depth:
        fail(f"--bertscore-layer {layer}: {args.bertscore_model} has the layers 1 to {depth}")
    return layer


def bertscore(texts: list[str], references: list[str], args, questions: list[int] | None = None) -> dict:
    """F1 of greedily matched contextual embeddings (1904.09675), raw: no idf weights, not rescaled by the
    baseline."""
    from bert_score import BERTScorer

    layer = bertscore_layer(args)
    scorer = BERTScorer(
        args.bertscore_model,
        num_layers=layer,
        batch_size=args.micro_batch_size,
        device=str(distributed.device()),
        use_fast_tokenizer=True,
    )
    if isinstance(scorer._tokenizer, (transformers.RobertaTokenizer, transformers.GPT2Tokenizer)):
        # bert-score asks `encode` for the space before the first word, which transformers 5 ignores there.
        scorer._tokenizer = transformers.AutoTokenizer.from_pretrained(
            args.bertscore_model, add_prefix_space=True, trust_remote_code=False
        )
    _limit(scorer._tokenizer)

    scores = [0.0] * len(texts)  # 0 of an empty text: bert-score 0.3.13 cannot encode it with transformers 5
    filled = []
    for i, (text, reference) in enumerate(zip(texts, references, strict=True)):
        if text.strip() and reference.strip():
            filled.append(i)
    if filled:
        _, _, f1 = scorer.score([texts[i] for i in filled], [references[i] for i in filled])
        for i, score in zip(filled, f1.tolist(), strict=True):
            scores[i] = score
    what = f"{args.bertscore_model} layer {layer}, F1, no idf, not rescaled"
    return mean(scores, f"{_version('bertscore')}, {what}", questions)


def toxicity(
    texts: list[str], references: list[str | None], args, questions: list[int] | None = None
) -> dict:
    """Probability that a classifier gives --toxicity-label; sigmoid or softmax as its configuration says."""
    classify = transformers.pipeline(
        "text-classification",
        model=args.toxicity_model,
        device=distributed.device(),
        trust_remote_code=False,
        model_kwargs=dict(use_safetensors=True),
        batch_size=args.micro_batch_size,
    )
    _limit(classify.tokenizer)
    scores = []
    for labels in classify(list(texts), top_k=None, truncation=True):  # all labels of each text
        for label in labels:
            if label["label"] == args.toxicity_label:
                scores.append(label["score"])
    return mean(scores, f"{args.toxicity_model}, label {args.toxicity_label}", questions)


METRICS = {"rouge_l": rouge_l, "bleu": bleu, "meteor": meteor, "bertscore": bertscore, "toxicity": toxicity}
