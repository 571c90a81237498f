"""Models in the ecosystem's own classes, sharded; log-probabilities and values of responses; reward functions; rollout."""

import importlib
import types
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint

from assets import reviews
from common import fsdp
from common.data import collate, encode_prompt, fail, micro_batches, stop_token
from optional import lora

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
    if config.is_encoder_decoder:
        if kind in ("value", "reward"):
            fail(f"{name}: an encoder-decoder cannot be a {kind} model here; its encoder would see the tokens it is to judge")
        if not hasattr(config, "relative_attention_num_buckets"):
            fail(f"{name}: of the encoder-decoders only the T5 family is supported, not {config.model_type}")
        kind = "encoder-decoder" if kind == "policy" else kind
    if kind not in ("policy", "encoder-decoder"):
        config.num_labels, config.classifier_dropout = 1, 0.0
        if trained or config.pad_token_id is None:  # a reward model from the hub is read where its own config says
            config.pad_token_id = tokenizer.pad_token_id
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    adapted = trained and bool(args.lora_rank)
    options = dict(config=config, dtype=master if trained and not adapted else compute)
    if hasattr(config, "relative_attention_num_buckets"):  # T5's position bias: fused kernels differ with and without gradient
        options["attn_implementation"] = "eager"
    source = None
    if fsdp.rank() == 0:
        source, info = _load(f"{kind} weights", AUTO[kind], name, use_safetensors=True, output_loading_info=True, **options)
        missing = {key for key in info["missing_keys"] if not key.endswith("inv_freq")}
        wrong = sorted(key for key in missing if key.split(".")[0] not in ("score", "classifier"))
        if wrong:
            fail(f"{name}: weights missing for a {kind} model: {wrong[0]}")
        if missing and not trained:
            fail(f"{name}: it has no head that was trained ({min(missing)} is missing), so it is no {kind} model")
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
        if source:  # kept from `generate`, which would take a repetition penalty from it: not what log-probabilities are of
            model.generation_to_export = source.generation_config
            model.generation_to_export.eos_token_id = stops if len(stops) > 1 else stops[0]
            if not model.generation_to_export.do_sample:  # a changed config is only saved without what it would not use
                model.generation_to_export.update(temperature=None, top_p=None, top_k=None)
    fsdp.shard(model, compute, args.shard_size, frozen=not trained)
    fsdp.load_full(model, source)
    if not adapted:  # else the adapters are, and a head
        model.requires_grad_(trained)
    if trained and args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train(trained)

def token_logprobs(hidden, weight, bias, tokens, temperature=1.0, forbidden=None, chunk=512):
    """Log-probability of each token and entropy of its distribution, both [N], from hidden states [N, H], without ever
    holding [N, vocab]: `chunk` rows at a time, recomputed in backward. `forbidden`: a token of probability zero."""

    def one(h, y):
        logits = F.linear(h, weight, bias)
        logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
        if forbidden is not None:
            logits = logits.index_fill(1, torch.full((1,), forbidden, device=h.device), torch.finfo(logits.dtype).min)
        logprobs = -F.cross_entropy(logits, y, reduction="none")  # first: the recomputation in backward ends here
        with torch.no_grad():
            return logprobs, torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)

    each = partial(checkpoint, one, use_reentrant=False) if torch.is_grad_enabled() else one
    parts = [each(h, y) for h, y in zip(hidden.split(chunk), tokens.split(chunk), strict=True)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

def response_positions(prompt_lengths, response_mask, width: int):
    """[B, T + 1] positions in the sequence of the last prompt token and of each response token, clamped to `width`."""
    steps = torch.arange(response_mask.shape[1] + 1, device=prompt_lengths.device)
    return (prompt_lengths[:, None] - 1 + steps).clamp(max=width - 1)

def response_logprobs(self, input_ids, prompt_lengths, response_mask, temperature=1.0, prompt_head=None):
    """log pi(y_t | x, y_<t) and the entropy at each step, both [B, T], zero where masked; with `prompt_head`, a linear layer,
    also its output [B] for the prompt: at its last token, or of an encoder the mean over its tokens.
    A decoder gets no attention mask: with padding on the right alone, a causal model never looks at it."""
    at = response_positions(prompt_lengths, response_mask, input_ids.shape[1])
    tokens = input_ids.gather(1, at[:, 1:])
    if self.config.is_encoder_decoder:
        ids, mask = only_prompts(input_ids, prompt_lengths)
        states = self.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        shifted = torch.cat([torch.full_like(tokens[:, :1], self.config.decoder_start_token_id), tokens[:, :-1]], 1)
        seen = dict(encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False)
        hidden = self.get_decoder()(input_ids=shifted, **seen).last_hidden_state
        prompt = (states * mask[..., None]).sum(1) / prompt_lengths[:, None]
        if getattr(self.config, "scale_decoder_outputs", False):  # T5's tied output layer; Flan-T5 has its own
            hidden = hidden * self.config.d_model**-0.5
    else:
        hidden = self.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = hidden.gather(1, at[:, :-1, None].expand(-1, -1, hidden.shape[-1]))
        prompt = hidden[:, 0]
    layer = self.get_output_embeddings()
    found = token_logprobs(hidden.flatten(0, 1), layer.weight, layer.bias, tokens.flatten(), temperature, self.forbidden_token)
    found = [x.view_as(tokens).masked_fill(~response_mask, 0.0) for x in found]
    return found if prompt_head is None else [*found, prompt_head(prompt.to(prompt_head.weight.dtype)).squeeze(-1)]

def only_prompts(input_ids, prompt_lengths):
    """The prompts of collated sequences, [B, P], and their attention mask."""
    mask = torch.arange(int(prompt_lengths.max()), device=input_ids.device) < prompt_lengths[:, None]
    return input_ids[:, : mask.shape[1]], mask.long()

def response_values(model, input_ids, prompt_lengths, response_mask):
    """[B, T + 1]: V(s_1) at the last prompt token, then Q(s_t, a_t) at each response token; zero where masked."""
    values = model(input_ids=input_ids, use_cache=False).logits.squeeze(-1)
    values = values.gather(1, response_positions(prompt_lengths, response_mask, input_ids.shape[1]))
    return values.masked_fill(~torch.cat([response_mask[:, :1], response_mask], 1), 0.0)

def sequence_scores(model, input_ids, prompt_lengths, response_mask):
    """[B, 1] scores. transformers reads the score at the last token that is not padding (with pad = eos: the one before)."""
    return model(input_ids=input_ids, use_cache=False).logits

def run_micro_batches(forward, sequences, size: int, pad_id: int, width: int, dtype=torch.float32):
    """[N, width] results of `forward(micro-batch) -> [b, t]` for all N global sequences, on every rank.
    No gradient. Each rank computes its share in length-sorted micro-batches; the sum over ranks puts the rest in."""
    out = torch.zeros(len(sequences), width, dtype=dtype, device=fsdp.device())
    lengths = [len(p) + len(r) for p, r in sequences]
    with torch.no_grad():
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
    if args.lora_rank and not args.ref_model:
        return lora.AdapterOff(policy)
    return load_model("policy", name, tokenizer, args, trained=False)

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
            scores = run_micro_batches(forward, sequences, self.size, config.pad_token_id, 1)[:, 0]
            scores = (scores - getattr(config, "score_mean", 0.0)) / (getattr(config, "score_std", None) or 1.0)
        if not torch.isfinite(scores).all():
            bad = int((~torch.isfinite(scores)).nonzero()[0])
            fail(f"--reward {self.name} gave {scores[bad].item()} for the response {texts[bad][:80]!r}")
        return scores

class SampleByInverseCDF:
    """A logits processor that leaves one token: the first whose cumulative probability passes a uniform number.
    The numbers [B, T] are drawn per *sequence*, so a response depends on neither its rank nor its neighbours in the batch."""

    def __init__(self, uniforms, temperatures, forbidden: int | None):  # [B, T], [B]
        self.uniforms, self.temperatures, self.forbidden = iter(uniforms.double().unbind(1)), temperatures[:, None], forbidden

    def __call__(self, input_ids, scores):
        scores = scores.double()
        if self.forbidden is not None:
            scores[:, self.forbidden] = -torch.inf
        greedy = self.temperatures == 0
        cdf = (scores / self.temperatures.masked_fill(greedy, 1.0)).softmax(-1).cumsum(-1)
        token = torch.searchsorted(cdf, next(self.uniforms)[:, None] * cdf[:, -1:], right=True)
        token = torch.where(greedy, scores.argmax(-1, keepdim=True), token)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

@torch.no_grad()
def rollout(policy, tokenizer, prompts: list[list[int]], max_new_tokens: int, temperature, seed: tuple, size: int = 0):
    """Sampled response tokens for all prompts (token lists), on every rank: list of N lists, stop token included.
    `temperature`: a number, or one for each prompt; 0 is greedy. A response without a stop token was cut off at
    `max_new_tokens`. Parameters stay gathered for the whole rollout; `size` prompts at a time (0: all of this rank's)."""
    stops, pad = sorted({stop_token(tokenizer), tokenizer.eos_token_id}), tokenizer.pad_token_id
    config = transformers.GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad, do_sample=False)
    config.decoder_start_token_id = getattr(policy.config, "decoder_start_token_id", None)
    temperatures = torch.as_tensor(temperature, dtype=torch.float64, device=fsdp.device()).expand(len(prompts))
    mine = sorted(range(fsdp.rank(), len(prompts), fsdp.world()), key=lambda i: len(prompts[i]))
    responses, training = {}, policy.training
    policy.eval()
    with fsdp.gathered(policy):
        for start in range(0, len(mine), size or len(mine) or 1):
            pick = mine[start : start + (size or len(mine))]
            width = max(len(prompts[i]) for i in pick)
            uniforms = torch.empty(len(pick), max_new_tokens)  # and prompts padded on the left: they go on from the last column
            ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in pick])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in pick])
            for row, i in enumerate(pick):
                number = ((seed[0] * 1_000_003 + seed[1]) * 1_000_003 + i) % 2**63
                uniforms[row] = torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(number))
            sampler = SampleByInverseCDF(uniforms.to(fsdp.device()), temperatures[pick], policy.forbidden_token)
            out = policy.generate(
                ids.to(fsdp.device()), attention_mask=mask.to(fsdp.device()), generation_config=config,
                logits_processor=transformers.LogitsProcessorList([sampler]), synced_gpus=False,
            )  # fmt: skip
            first = 1 if policy.config.is_encoder_decoder else width  # a decoder's output begins with its input
            for i, tokens in zip(pick, out[:, first:].tolist(), strict=True):
                end = next((t for t, token in enumerate(tokens) if token in stops), len(tokens) - 1)
                responses[i] = tokens[: end + 1]
    policy.train(training)
    merged = {i: r for part in fsdp.all_gather_object(responses) for i, r in part.items()}
    return [merged[i] for i in range(len(prompts))]
