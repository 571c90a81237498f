"""Models in the ecosystem's own classes, sharded; log-probabilities and values of responses; reward functions."""

import importlib
import types
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from assets import reviews
from common import fsdp
from common.data import collate, encode_prompt, fail, micro_batches, note, stop_token
from optional import lora, offload, t5

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # what a load leaves out is checked below, and said in one line
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing here writes in place
AUTO = {
    "policy": transformers.AutoModelForCausalLM,
    "encoder-decoder": transformers.AutoModelForSeq2SeqLM,  # a policy of the T5 family
    "value": transformers.AutoModelForTokenClassification,  # a linear hidden -> 1 on every token
    "reward": transformers.AutoModelForSequenceClassification,  # the same on the last token
    "prompt value": transformers.AutoModelForTokenClassification,  # read at the prompt alone, so it may be an encoder
}

def resolve(name: str, embedded: str = "policy") -> str:
    """A model name to a folder or hub id: `reviews` becomes the embedded model of that kind."""
    if name == "reviews":
        return reviews.folder(embedded)
    if not name:
        fail("--reward: give a reward model (folder or hub id) or module:function")
    if (name.count("/") > 1 or name.startswith((".", "/")) or Path(name).is_dir()) and not Path(name, "config.json").is_file():
        fail(f"{name}: no model folder there (no config.json)")
    return name

def _load(what: str, auto, name: str, **kwargs):
    try:
        return auto.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        fail(f"{name}: no {what} in such a folder or hub id ({str(error).splitlines()[0]})")

def load_tokenizer(name: str):
    """The tokenizer of a model, with a padding token (its eos where it has none: our masks come from positions)."""
    tokenizer = _load("tokenizer", transformers.AutoTokenizer, name)
    if tokenizer.eos_token_id is None:
        fail(f"{name}: its tokenizer has no end-of-sequence token, so a response could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = _load("configuration", transformers.AutoConfig, name)
    tokenizer.of_encoder_decoder = config.is_encoder_decoder  # encode_prompt asks
    return tokenizer

def check_same_tokenizer(tokenizer, name: str, flag: str = "") -> bool:
    """Whether a model reads the policy's tokens as they are. A value model (named by `flag`) must."""
    other = load_tokenizer(name)
    same = other.get_vocab() == tokenizer.get_vocab() and other.chat_template == tokenizer.chat_template
    return same or bool(flag and fail(f"{flag} {name}: its tokenizer differs from the policy's; train it on the policy's own"))

def check_unread(name: str, kind: str, keys, cut: bool) -> None:
    """Weights of a folder that the model has no place for, by their names `keys`, are not left out in silence. An output layer
    is what a value model leaves behind of a policy; a policy from a value model is a mistake. `cut`: to the first layers."""
    heads = {key for key in keys if key.split(".")[0] in ("lm_head", "score", "classifier")}
    judging = sorted(key for key in heads if not key.startswith("lm_head"))
    if judging and kind in ("policy", "encoder-decoder"):
        fail(f"{name}: a value or reward model (it has {judging[0]}), no {kind}")
    rest = sorted(set(keys) - heads)
    if rest and not cut:
        note(f"{name}: {len(rest)} of its weights have no place in a {kind} model and are not read, {rest[0]} for one")

def load_model(kind: str, name: str, tokenizer, args, *, trained: bool, layers: int = 0):
    """A sharded policy, value or reward model, dropout off, head zero-initialised where the folder has none.
    Rank 0 reads the weights (safetensors only, no remote code), the others receive their shard. Trained models keep
    float32 master weights, frozen ones the compute type, and no gradient. `layers` keeps the first N of them."""
    compute, master = fsdp.dtypes(args.precision)
    config = _load("configuration", transformers.AutoConfig, name)
    for key, value in vars(config).items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)  # log-probabilities are of the distribution that was sampled
    scaled = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    if kind == "policy" and any(getattr(config, key, None) for key in scaled):
        fail(f"{name}: it scales or caps its logits after the output layer, which the chunked log-probabilities do not do")
    kind = t5.checked(config, kind, name) if config.is_encoder_decoder else kind
    if kind not in ("policy", "encoder-decoder"):
        config.num_labels, config.classifier_dropout = 1, 0.0
        if trained or config.pad_token_id is None:  # a reward model from the hub is read where its own config says
            config.pad_token_id = tokenizer.pad_token_id
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    adapted = trained and bool(args.lora_rank)
    options = dict(config=config, dtype=master if trained and not adapted else compute)
    if hasattr(config, "relative_attention_num_buckets"):
        options["attn_implementation"] = "eager"  # T5's position bias: fused kernels differ with and without gradient
    source = None
    if fsdp.rank() == 0:
        source, info = _load(f"{kind} weights", AUTO[kind], name, use_safetensors=True, output_loading_info=True, **options)
        missing = {key for key in info["missing_keys"] if not key.endswith("inv_freq")}
        wrong = sorted(key for key in missing if key.split(".")[0] not in ("score", "classifier"))
        if wrong:
            fail(f"{name}: weights missing for a {kind} model: {wrong[0]}")
        if missing and not trained:
            fail(f"{name}: it has no head that was trained ({min(missing)} is missing), so it is no {kind} model")
        check_unread(name, kind, info["unexpected_keys"], cut=bool(layers))
        for key, parameter in source.named_parameters():
            if key in missing:
                torch.nn.init.zeros_(parameter)
        if kind == "value" and getattr(config, "score_std", None):  # from reward.py: start at its *standardised* scores
            fsdp.head(source).weight.data.div_(config.score_std)
            fsdp.head(source).bias.data.sub_(config.score_mean).div_(config.score_std)
            config.score_std = None  # done
    with torch.device("meta"):
        model = AUTO[kind].from_config(**options)
    for module in filter(None, (source, model)):
        if "value" in kind:
            fsdp.head(module).to(master)  # a value in bfloat16 has 3 digits: the head computes in full precision
        if adapted:
            lora.add(module, module.get_output_embeddings() if module.can_generate() else fsdp.head(module), name, args, master)
    if model.can_generate():  # registered with FSDP below, so that calling it gathers the root's parameters
        model.response_logprobs = types.MethodType(response_logprobs, model)
        pad = tokenizer.pad_token_id
        stops = sorted({tokenizer.eos_token_id, stop_token(tokenizer)})
        model.forbidden_token = None if pad in stops else pad
        model.compute_dtype = compute  # by which rollouts judge what is rounding
        if source:  # for the export: a rollout reads nothing of it, least of all a repetition penalty
            model.generation_config = source.generation_config
            model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
            if not model.generation_config.do_sample:  # a changed config is only saved without what it would not use
                model.generation_config.update(temperature=None, top_p=None, top_k=None)
    fsdp.shard(model, compute, args.shard_size, frozen=not trained)
    fsdp.load_full(model, source)
    if not adapted:  # else the adapters are, and a head
        model.requires_grad_(trained)
    if trained and args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # transformers < 5.20: so
        enable({"use_reentrant": False})
    return model.train(trained)

class TokenLogprobs(torch.autograd.Function):
    """`chunk` rows of logits at a time, in forward and again in backward, but for the last chunk, whose backward is the first to
    come and overwrites what forward left: less time than checkpointed chunks take, and no more memory."""

    @staticmethod
    def logits(hidden, weight, bias, temperature, forbidden):
        logits = F.linear(hidden, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if temperature == 1 else logits.div_(temperature)
        if forbidden is not None:
            logits[:, forbidden] = torch.finfo(logits.dtype).min
        return logits

    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, temperature, forbidden, chunk):
        parts = []
        for h, y in zip(hidden.split(chunk), tokens.split(chunk), strict=True):
            logits = TokenLogprobs.logits(h, weight, bias, temperature, forbidden)
            top = logits.amax(1)
            odds = (logits - top[:, None]).exp_()
            total = odds.sum(1)
            log_total = top + total.log()
            entropy = log_total - torch.linalg.vecdot(odds, logits) / total
            parts.append((logits.gather(1, y[:, None]).squeeze(1) - log_total, entropy, log_total))
        logprobs, entropy, log_total = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, tokens, log_total)
        ctx.rest, ctx.last = (temperature, forbidden, chunk), (odds, total)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        """d log p(y) / d logits = onehot(y) - p."""
        (hidden, weight, bias, tokens, log_total), (temperature, forbidden, chunk) = ctx.saved_tensors, ctx.rest
        of_hidden = torch.empty_like(hidden)
        of_weight, of_bias = (torch.zeros_like(x) if x is not None and x.requires_grad else None for x in (weight, bias))
        for start in reversed(range(0, len(hidden), chunk)):
            at = slice(start, start + chunk)
            if ctx.last:
                (of_logits, total), ctx.last = ctx.last, None
                of_logits.div_(total[:, None])
            else:
                of_logits = TokenLogprobs.logits(hidden[at], weight, bias, temperature, forbidden)
                of_logits.sub_(log_total[at, None]).exp_()
            scale = grad[at, None] / temperature
            of_logits = of_logits.mul_(-scale).scatter_add_(1, tokens[at, None], scale).to(weight.dtype)
            of_hidden[at] = of_logits @ weight
            if of_weight is not None:
                of_weight.addmm_(of_logits.T, hidden[at])
            if of_bias is not None:
                of_bias += of_logits.sum(0)
        return of_hidden, of_weight, of_bias, None, None, None, None

def token_logprobs(hidden, weight, bias, tokens, temperature=1.0, forbidden=None, chunk=512):
    """Log-probability of each token and entropy of its distribution (without gradient), both [N], from hidden states [N, H],
    without ever holding [N, vocab]. `forbidden`: a token of probability zero."""
    return TokenLogprobs.apply(hidden, weight, bias, tokens, temperature, forbidden, chunk)

def response_positions(prompt_lengths, response_mask, width: int):
    """[B, T + 1] positions in the sequence of the last prompt token and of each response token, clamped to `width`."""
    return (prompt_lengths[:, None] + torch.arange(-1, response_mask.shape[1], device=prompt_lengths.device)).clamp(max=width - 1)

def response_logprobs(self, input_ids, prompt_lengths, response_mask, temperature=1.0, prompt_head=None):
    """log pi(y_t | x, y_<t) and the entropy at each step, both [B, T], zero where masked; with `prompt_head`, a linear layer,
    also its output [B] for the prompt: at its last token, or of an encoder the mean over its tokens.
    A decoder gets no attention mask: with padding on the right alone, a causal model never looks at it."""
    at = response_positions(prompt_lengths, response_mask, input_ids.shape[1])
    tokens = input_ids.gather(1, at[:, 1:])
    real = response_mask.flatten().nonzero().squeeze(1)  # no output layer for padding; asked before there is work to wait for
    if self.config.is_encoder_decoder:
        hidden, prompt = t5.hidden_states(self, input_ids, prompt_lengths, tokens)
    else:
        hidden = self.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = hidden.gather(1, at[:, :-1, None].expand(-1, -1, hidden.shape[-1]))
        prompt = hidden[:, 0]
    layer = self.get_output_embeddings()
    given = (hidden.flatten(0, 1)[real], layer.weight, layer.bias, tokens.flatten()[real], temperature, self.forbidden_token)
    found = [x.new_zeros(tokens.numel()).index_put((real,), x).view_as(tokens) for x in token_logprobs(*given)]
    return found if prompt_head is None else [*found, prompt_head(prompt.to(prompt_head.weight.dtype)).squeeze(-1)]

def response_values(model, input_ids, prompt_lengths, response_mask):
    """[B, T + 1]: V(s_1) at the last prompt token, then Q(s_t, a_t) at each response token; zero where masked."""
    values = model(input_ids=input_ids, use_cache=False).logits.squeeze(-1)
    values = values.gather(1, response_positions(prompt_lengths, response_mask, input_ids.shape[1]))
    return values.masked_fill(~torch.cat([response_mask[:, :1], response_mask], 1), 0.0)

def sequence_scores(model, input_ids, prompt_lengths, response_mask):
    """[B, 1] scores. transformers reads the score at the last token that is not padding (with pad = eos: the one before)."""
    return model(input_ids=input_ids, use_cache=False).logits

def run_micro_batches(forward, sequences, size: int, pad_id: int, width: int, dtype=torch.float32, model=None):
    """[N, width] results of `forward(micro-batch) -> [b, t]` for all N global sequences, on every rank. `model`: which of those
    that --offload-frozen parks is read. No gradient. Each rank computes its share, length-sorted; the sum puts the rest in."""
    out = torch.zeros(len(sequences), width, dtype=dtype, device=fsdp.device())
    lengths = [len(p) + len(r) for p, r in sequences]
    with torch.no_grad(), offload.on_device(model):
        for pick in micro_batches(range(len(sequences)), lengths, size, fsdp.rank(), fsdp.world()):
            result = forward(collate([sequences[i] for i in pick], pad_id, out.device))
            if pick:
                out[torch.tensor(pick, device=out.device), : result.shape[1]] = result.to(dtype)
    return fsdp.all_reduce(out)

def sequence_logprobs(model, sequences, size: int, pad_id: int, temperature: float = 1.0):
    """log pi(y | x) [N], summed over tokens, in float64, on every rank. No gradient."""
    forward = lambda mb: model.response_logprobs(**mb, temperature=temperature)[0].double().sum(1, keepdim=True)
    return run_micro_batches(forward, sequences, size, pad_id, 1, torch.float64)[:, 0]

def load_reference(policy, name: str, tokenizer, args):
    """The frozen reference; with LoRA, where --ref-model names no other, the policy itself with its adapters off."""
    own = args.lora_rank and not args.ref_model
    return lora.AdapterOff(policy) if own else load_model("policy", name, tokenizer, args, trained=False)

class Reward:
    """`reward(rows, sequences, texts) -> [N]` from a reward model (folder or hub id) or `module:function`. A function gets
    (prompts, responses, **other columns of the rows), equally long lists, and returns numbers. A model gets the tokens where
    the tokenizers agree, else the text by its own template; with `score_mean`, `score_std` in its config it standardises."""

    def __init__(self, name: str, tokenizer, args):
        self.name, self.model, self.label, self.size = name, None, "reward_model", args.micro_batch_size
        if ":" in name and not Path(name).exists():
            module, _, self.label = name.partition(":")
            try:
                self.function = getattr(importlib.import_module(module), self.label)
            except (ImportError, AttributeError) as error:
                fail(f"--reward {name}: {error}; give a model folder, a hub id or module:function")
            return
        name = resolve(name)
        self.tokenizer, self.same = load_tokenizer(name), check_same_tokenizer(tokenizer, name)
        self.model = load_model("reward", name, self.tokenizer, args, trained=False)

    def __call__(self, rows: list[dict], sequences: list[tuple[list[int], list[int]]], texts: list[str]) -> torch.Tensor:
        if self.model is None:
            scores = torch.zeros(len(rows), device=fsdp.device())
            mine = list(range(fsdp.rank(), len(rows), fsdp.world()))
            names = {key for row in rows for key in row if not key.endswith("_ids")} - {"prompt", "response"}
            if mine:
                columns = {key: [rows[i].get(key) for i in mine] for key in names}
                found = self.function([rows[i]["prompt"] for i in mine], [texts[i] for i in mine], **columns)
                scores[mine] = torch.tensor(found, dtype=torch.float32, device=scores.device).reshape(len(mine))
            scores = fsdp.all_reduce(scores)
        else:
            if not self.same:
                stop, answers = [stop_token(self.tokenizer)], self.tokenizer(texts, add_special_tokens=False)["input_ids"]
                sequences = [(encode_prompt(self.tokenizer, r["prompt"]), a + stop) for r, a in zip(rows, answers, strict=True)]
            config, forward = self.model.config, lambda mb: sequence_scores(self.model, **mb)
            scores = run_micro_batches(forward, sequences, self.size, config.pad_token_id, 1, model=self.model)[:, 0]
            scores = (scores - getattr(config, "score_mean", 0.0)) / (getattr(config, "score_std", None) or 1.0)
        if not torch.isfinite(scores).all():
            bad = int((~torch.isfinite(scores)).nonzero()[0])
            fail(f"--reward {self.name} gave {scores[bad].item()} for the response {texts[bad][:80]!r}")
        return scores
