"""Rollouts by vLLM inside each process: `--rollout-engine vllm`. Before each rollout of a policy that is trained
its weights are copied into vLLM's model, in place; with the tokens come the log-probabilities of the sampler
that drew them."""

import gc
import importlib.util
import os

import torch

from common import distributed, lora, sharding
from common.cli import fail


def check(args) -> None:
    """Ends with one line where vLLM is asked for and cannot be used."""
    if getattr(args, "rollout_engine", "torch") != "vllm":
        return
    cap = getattr(args, "importance_cap", 0.0)  # evaluate.py trains nothing
    if cap < 0:
        fail(f"--importance-cap is {cap}; it must not be negative (0: no weights)")
    greedy = args.temperature == 0  # in evaluate.py
    if not greedy and not 0.01 <= args.temperature <= 2:
        fail(f"--temperature is {args.temperature}; --rollout-engine vllm samples at 0.01 to 2")
    if args.precision == "fp64":
        fail("--rollout-engine vllm: it computes in bf16 or fp32, not in fp64")
    if not importlib.util.find_spec("vllm"):
        fail(
            "--rollout-engine vllm needs the package: "
            "pip install -r requirements-vllm.txt, in an environment of its own"
        )


def start(policy, name: str, args):
    """(What `rollout` samples with, the cap of importance weights).

    That is None and 0 for our own loop, whose samples are the policy's own and need no correction.
    """
    if args.rollout_engine == "vllm":
        return Engine(policy, name, args), args.importance_cap
    return None, 0.0


class Engine:
    """vLLM's `LLM` in this process, one per rank: each generates its own share of the prompts."""

    def __init__(self, policy, name: str, args):
        if policy.config.is_encoder_decoder:
            fail(f"{name}: --rollout-engine vllm runs decoders alone, not {policy.config.model_type}")
        # These are read when vLLM is imported.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model is to be in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or all ranks share one core
        import vllm

        self.longest = args.max_prompt_length + args.max_response_length
        self.loaded = False  # whether weights have come
        self.params = vllm.SamplingParams
        try:
            self.llm = vllm.LLM(
                name,
                load_format="dummy",  # `load` brings the weights
                skip_tokenizer_init=True,
                dtype=str(distributed.dtypes(args.precision)[0]).removeprefix("torch."),
                seed=args.seed,
                max_model_len=self.longest,
                max_num_seqs=getattr(args, "rollout_batch_size", 0) or 256,
                kv_cache_memory_bytes=int(args.vllm_cache_gb * 2**30),
                gpu_memory_utilization=0.01,  # a check at the start asks for it; the line above decides
                enforce_eager=not torch.cuda.is_available(),
                distributed_executor_backend="external_launcher" if "RANK" in os.environ else "uni",
                logprobs_mode="processed_logprobs",  # of what is sampled: after temperature and bias
                generation_config="vllm",  # the model folder's own would bring top_p, repetition penalties
            )
        except (ValueError, torch.OutOfMemoryError) as error:
            fail(f"--rollout-engine vllm: {' '.join(str(error).split())}")
        # vLLM wraps, and so breaks, transformers' own class where it has none of its own for this
        # architecture
        if type(policy.base_model).__call__ is not torch.nn.Module.__call__:
            fail(f"{name}: vLLM has no {policy.config.model_type} of its own; sample with torch")
        # vLLM freezes what exists for the garbage collector; FSDP's models must be collected before the
        # process group goes
        gc.unfreeze()
        # at exit it would destroy the process group, which is ours, and gone by then
        self.llm.llm_engine.engine_core._finalizer.detach()

    def load(self, policy) -> None:
        """Copies the gathered policy's weights (of LoRA the merged ones) into vLLM's, which drops its cache.

        Ends with one line where vLLM names a layer otherwise.
        """
        # of tied weights both names: some backends keep copies of each
        weights = policy.named_parameters(remove_duplicate=False)
        if hasattr(policy, "lora"):
            weights = lora.merged(dict(weights), policy.lora.lora_alpha / policy.lora.r)
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        except (ValueError, KeyError) as error:
            fail(f"--rollout-engine vllm: {' '.join(str(error).split())}; sample with torch")
        if not self.llm.reset_prefix_cache():
            fail("--rollout-engine vllm: its prefix cache could not be emptied")
        self.loaded = True

    def generate(
        self,
        policy,
        prompts: list[list[int]],
        seeds: list[int],
        temperatures: list[float],
        limit: int,
        stops: list[int],
        filters,
    ) -> list[tuple[list[int], list[float]]]:
        """As `rollout.decode`: (tokens, their log-probabilities) for each prompt; a seed for each. With `filters`
        (`rollout.Filters`), in vLLM's own form, the log-probabilities are those of what they leave."""
        if not (policy.frozen and self.loaded):
            with sharding.gathered(policy):
                self.load(policy)
        if not prompts:
            return []
        longest = max(map(len, prompts)) + limit
        if longest > self.longest:  # a later turn, in evaluate.py
            fail(
                f"--rollout-engine vllm: a prompt with its response has up to {longest} tokens, and room was made "
                f"for {self.longest}: raise --max-prompt-length"
            )
        # our stops alone: without ignore_eos those of the folder's generation config would end a response too
        options = dict(max_tokens=limit, stop_token_ids=stops, ignore_eos=True, detokenize=False, logprobs=0)
        options |= filters._asdict()  # vLLM has the same names, and values that change nothing
        if policy.forbidden_tokens is not None:
            options["logit_bias"] = dict.fromkeys(policy.forbidden_tokens.tolist(), -100.0)
        params = [
            self.params(seed=s, temperature=t, **options) for s, t in zip(seeds, temperatures, strict=True)
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        responses = []
        for output in self.llm.generate(inputs, params, use_tqdm=False):
            sampled = output.outputs[0]
            tokens = list(sampled.token_ids)
            logprobs = [
                of_step[token].logprob for token, of_step in zip(tokens, sampled.logprobs, strict=True)
            ]
            responses.append((tokens, logprobs))
        return responses
