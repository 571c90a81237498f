"""Memory of a run on N GPUs, by phase, without a GPU and without weights: the script's own `main` with fake tensors.

    python tools/plan_memory.py --algorithm ppo --gpus 8 --model Llama-3-8B --batch-size 64 --mini-batch-size 64 \
        --micro-batch-size 1 --max-prompt-length 512 --max-response-length 512 --gradient-checkpointing
    python tools/plan_memory.py --table                                # `make plan`: beside 2502.16944's figures
    python tools/plan_memory.py --validate --algorithm dvpo            # one real step on this device beside the plan

Every flag that is not listed by --help is the script's own. Model names (`--model`, `--reward`, `--critic`, `--gvm`) are presets
or folders with a config.json. docs/memory.md says what is modelled, and how far the plan is from real steps.
"""

import bisect
import contextlib
import functools
import gc
import importlib
import inspect
import json
import re
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import torch.distributed as dist
import transformers
import tyro
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools import fake_collectives  # teaches fake tensors the collectives
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import batches, distributed, models, offload, sharding, tokenization
from common import rollout as rollout_room
from common.batches import micro_batches
from common.cli import fail, parse

GB = 2**30
aten = torch.ops.aten
LLAMA = dict(vocab_size=128256, num_key_value_heads=8, rope_theta=500000.0, max_position_embeddings=131072)


def _llama(hidden, ffn, layers, heads, head_dim=128, tied=False):
    sizes = dict(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads
    )
    return transformers.LlamaConfig(**LLAMA, **sizes, head_dim=head_dim, tie_word_embeddings=tied)


def _qwen(hidden, ffn, layers, heads, kv_heads, vocabulary=152064, tied=False):
    sizes = dict(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads
    )
    more = dict(
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
    )
    return transformers.Qwen2Config(**sizes, **more)


PRESETS = {  # the published config.json of each
    "Llama-3.2-1B": lambda: _llama(2048, 8192, 16, 32, head_dim=64, tied=True),
    "Llama-3.2-3B": lambda: _llama(3072, 8192, 28, 24, tied=True),
    "Llama-3-8B": lambda: _llama(4096, 14336, 32, 32),
    "Llama-3-70B": lambda: _llama(8192, 28672, 80, 64),
    "Qwen2.5-0.5B": lambda: _qwen(896, 4864, 24, 14, 2, 151936, tied=True),
    "Qwen2.5-7B": lambda: _qwen(3584, 18944, 28, 28, 4),
    "Qwen2.5-14B": lambda: _qwen(5120, 13824, 48, 40, 8),
    "Qwen2.5-32B": lambda: _qwen(5120, 27648, 64, 40, 8),
}


class Enough(BaseException):
    """Ends `main` where it would only repeat itself."""


@dataclass
class Some:
    """An iterator that knows how many it will yield."""

    picks: Iterator
    number: int

    def __iter__(self):
        return self.picks

    def __len__(self):
        return self.number


class Tokenizer:
    """Token lists of a wanted length: the text "17 512" is number 17, 512 tokens."""

    pad_token_id, eos_token_id, bos_token_id, chat_template = 0, 1, 2, None

    def __call__(self, text, **_):
        number, length = map(int, text.split())
        return {"input_ids": [3 + (number >> 5 * i) % 32 for i in range(min(4, length))] + [3] * (length - 4)}

    def get_vocab(self):
        return {}

    def batch_decode(self, responses, **_):
        return [""] * len(responses)


class Tracker(TorchDispatchMode):
    """Bytes of live storage and their peak by phase. A phase is what the script's own banners (`# --- rollout`) name, read from
    the line at which `main` stands. With `fake`, it also answers what fake tensors cannot: their values (a constant), and
    how many entries a mask selects (all)."""

    def __init__(self, main, device: str, fake: FakeTensorMode | None, until: str):
        super().__init__()
        self.code, self.device, self.fake, self.until, self.frame = main.__code__, device, fake, until, None
        lines, self.first = inspect.getsourcelines(main)
        found = [
            (self.first + i, m[1])
            for i, line in enumerate(lines)
            if (m := re.match(r"\s*# --- (\w+)$", line))
        ]
        self.banners, self.names = [at for at, _ in found], [name for _, name in found]
        self.live, self.total, self.peaks, self.at_peak, self.new_peak = {}, 0, Counter(), {}, None
        self.now, self.cuda, self.weight, self.steps, self.sent, self.calls = (
            "setup",
            {},
            1,
            1,
            Counter(),
            Counter(),
        )

    def phase(self) -> str:
        if self.frame is None:
            frame = sys._getframe()
            while frame is not None and frame.f_code is not self.code:
                frame = frame.f_back
            self.frame = frame
        at = bisect.bisect_right(self.banners, self.frame.f_lineno) - 1 if self.frame else -1
        name = self.names[at] if at >= 0 else "setup"
        if name != self.now and self.device == "cuda":  # what the allocator itself says
            self.cuda[self.now] = max(self.cuda.get(self.now, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        self.now = name
        if name == self.until:
            raise Enough
        return name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local operations come by again
        active = active_fake_mode()
        if active is not None and active is not self.fake:  # DTensor's, to find the shape of a result
            return func(*args, **kwargs)
        phase = self.phase()
        if func in fake_collectives.collective_ops and func not in fake_collectives.sync_ops:
            self.count(phase, func, args, kwargs)
        if self.fake:
            if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
                return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
            if func is aten.nonzero.default and isinstance(args[0], FakeTensor):
                return torch.ones(args[0].shape, dtype=torch.bool).nonzero()
            if func is aten.index.Tensor and any(isinstance(t, FakeTensor) for t in tree_leaves(args)):
                masks = [i is not None and i.dtype == torch.bool for i in args[1]]
                whole = [self.places(i) if mask else (i,) for i, mask in zip(args[1], masks, strict=True)]
                args = (args[0], [i for part in whole for i in part])
            if func is aten.empty.memory_format and active is None and len(args[0]) == 1 and args[0][0] > 512:
                with self.fake:  # what FSDP gathers into
                    return self.track(func(*args, **kwargs), phase, func)
        return self.track(func(*args, **kwargs), phase, func)

    @staticmethod
    def places(mask):
        return (
            (torch.ones(mask.shape, dtype=torch.bool) if isinstance(mask, FakeTensor) else mask)
            .nonzero()
            .unbind(1)
        )

    def track(self, out, phase, func):
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = [0, (str(func), str(tensor.dtype), tuple(tensor.shape))]
                    weakref.finalize(storage, self.resize, storage._cdata, None)
                    self.resize(storage._cdata, storage.nbytes(), phase)
        return out

    def resize(self, key, size, phase=None):
        """A storage is created, resized, or (None) freed. Blocks are multiples of 512 bytes, as in CUDA's allocator."""
        entry, size_now = self.live[key], -(-(size or 0) // 512) * 512
        if size_now < entry[0] and self.new_peak:
            self.at_peak[self.new_peak] = [tuple(entry) for entry in self.live.values() if entry[0]]
            self.new_peak = None
        self.total += size_now - entry[0]
        entry[0] = size_now
        if size is None:
            del self.live[key]
        elif self.total > self.peaks[phase := phase or self.phase()]:
            self.peaks[phase], self.new_peak = self.total, phase

    @contextlib.contextmanager
    def watching(self):
        resize = (
            torch.UntypedStorage.resize_
        )  # FSDP frees and refills what it gathers by this, not by an operation

        def watched(storage, size):
            resize(storage, size)
            if storage._cdata in self.live:
                self.resize(storage._cdata, size)
            return storage

        with mock.patch.object(torch.UntypedStorage, "resize_", watched), self:
            yield

    def count(self, phase, func, args, kwargs):
        """Bytes a rank sends in a collective, by the ring algorithms."""
        kind = next(k for k in ("gather", "reduce_scatter", "reduce", "broadcast", "") if k in str(func))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        size = max(t.numel() * t.element_size() for t in tensors)
        try:
            group = fake_collectives.CollectiveOp.get_process_group(func, args).size()
        except (TypeError, ValueError, IndexError, RuntimeError):
            group = dist.get_world_size()
        key = (
            phase,
            {"gather": "all-gather", "reduce_scatter": "reduce-scatter", "reduce": "all-reduce"}.get(
                kind, kind
            ),
            group,
        )
        weight = min(self.weight, self.steps) if kind == "reduce" else self.weight  # of replicas: once a step
        self.sent[key] += weight * size * (2 if kind == "reduce" else 1) * (group - 1) // group
        self.calls[key] += weight


@dataclass
class Measured:
    phases: dict[str, int]
    """peak bytes by phase: of a real step on a GPU by CUDA's allocator"""
    state: dict[str, int]
    """bytes of weights by model, of gradients and of the optimizers"""
    at_peak: dict[str, list]
    """live storages at each phase's peak: (bytes, (operation, type, shape))"""
    sent: dict
    """(phase, collective, ranks) -> bytes a rank sends in a step, and how often"""
    seconds: float
    args: object

    def steps(self) -> list[str]:
        """The phases of a step. What comes before holds copies of the weights on the host, which are no memory of a GPU."""
        return [phase for phase in self.phases if phase not in ("setup", "data", "models", "log", "save")]

    def idle(self, gpus: int) -> list[str]:
        """What has come apart at so many ranks."""
        sizes = {
            "batch": self.args.batch_size,
            "mini-batch": getattr(self.args, "mini_batch_size", self.args.batch_size),
        }
        return [
            f"a {name} of {n} leaves {gpus - n} of {gpus} ranks without a sequence"
            for name, n in sizes.items()
            if n < gpus
        ]


def prepare(algorithm: str, flags: list[str], folder: str):
    """The script's module and its Args, with data made up to the lengths asked for."""
    script = importlib.import_module(algorithm)
    data = Path(folder, "rows.jsonl")
    fixed = ["--dataset", str(data), "--run-dir", f"{folder}/run", "--overwrite"]
    own = {field: str(value) for field, value in dict(eval_every=0, eval_prompts=0, precision="bf16").items()}
    usual = [
        x
        for key, value in own.items()
        if hasattr(script.Args, key)
        for x in (f"--{key.replace('_', '-')}", value)
    ]
    args = parse(script.Args, {}, [*usual, *flags, *fixed])
    for name in (
        "reward",
        "gvm",
    ):  # a model of the policy's size, where none is named; gvm_td.py's rewards are in the rows
        if algorithm != "gvm_td" and getattr(args, name, None) in ("", "reviews"):
            setattr(args, name, args.model)
    args.epochs, args.seed = getattr(args, "epochs", 1), 0
    prompt, response = args.max_prompt_length, args.max_response_length - 1
    Path(args.run_dir).mkdir()
    with open(data, "w") as file:
        for i in range(4 * args.batch_size + 64):  # ragged by a token: equal lengths would need no mask
            row = {
                "prompt": f"{i // 2} {prompt - (i // 2) % 2}",
                "label": bool(i % 2),
                "reward": float(i // 4 % 2 + i % 2),
            }
            file.write(
                json.dumps(row | dict.fromkeys(("response", "chosen", "rejected"), f"{i} {response}")) + "\n"
            )
    return script, args


def find_config(name: str):
    """A preset's or folder's configuration; of "Llama-3-8B@4" with 4 layers."""
    name, _, layers = name.partition("@")
    if name not in PRESETS and not Path(name, "config.json").is_file():
        fail(f"{name}: neither a folder with a config.json nor one of {', '.join(PRESETS)}")
    config = PRESETS[name]() if name in PRESETS else transformers.AutoConfig.from_pretrained(name)
    config.num_hidden_layers = int(layers or config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def measure(
    algorithm: str, flags: list[str], gpus: int = 1, fake: bool = True, until: str = "log"
) -> Measured:
    """One step of the script's `main` on rank 0 of `gpus`: with fake tensors, or really, with random weights, on this device.
    It ends where the phase `until` begins."""
    begin, device = time.perf_counter(), "cpu" if fake else distributed.device().type
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        script, args = prepare(algorithm, flags, folder)
        if getattr(args, "rollout_engine", "torch") != "torch":
            fail("the planner counts our own loop; leave out --rollout-engine")
        mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
        tracker = Tracker(script.main, device, mode, until)
        state, minis, loaded = {}, Counter(), []
        put = lambda *where: stack.enter_context(mock.patch.object(*where))

        def load(what, auto, name, config=None, output_loading_info=False, **options):
            if what == "tokenizer":
                find_config(name)
                return Tokenizer()
            if what == "configuration":
                return find_config(name)
            with torch.device("meta" if fake else "cpu"):
                return auto.from_config(config, dtype=options["dtype"]), {
                    "missing_keys": [],
                    "unexpected_keys": [],
                }

        def load_full(model, source):
            if fake:  # the rest of it fills in the weights
                with mode:
                    model.to_empty(device=device)
                    model.tie_weights()
            else:
                real_load(model, source)
            loaded.append(model)
            kind = (
                "value"
                if "Token" in type(model).__name__
                else "reward"
                if "Sequence" in type(model).__name__
                else "policy"
            )
            count_state(f"{kind} model, {'frozen' if model.frozen else 'trained'}", model.parameters())

        def count_state(name, tensors):
            tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
            state[name] = state.get(name, 0) + sum(t.nbytes for t in tensors)

        def copy(to, source):
            """Of parked weights to the host and back; unseen by the tracker, for which on a CPU the two are one."""
            with _disable_current_modes():
                _ = fake or real_copy(to, source)

        def adamw(parameters, **options):
            """Its state is there from the start, as in any later step."""
            parameters = list(parameters)
            optimizer = real_adamw(parameters, **options)
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            count_state("gradients", [parameter.grad for parameter in parameters])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            count_state("optimizer", [t for s in optimizer.state.values() for t in s.values()])
            return optimizer

        def rollout(policy, tokenizer, prompts, max_new_tokens, temperature, seed, size=0, compare=True):
            """The real one, unchecked, for the first token and, with a long cache, the last; of many chunks the first two."""
            policy.sampler_checked = True
            if fake:
                some = prompts[: 2 * gpus * size] if size else prompts
                with long_cache(max(map(len, prompts)) + max_new_tokens - 1):
                    heat = temperature[: len(some)] if isinstance(temperature, list) else temperature
                    gather = lambda found: [dict.fromkeys(range(len(some)), ([3], [0.0]))]
                    with mock.patch.object(distributed, "all_gather_object", gather):
                        real_rollout(
                            policy, tokenizer, some, min(2, max_new_tokens), heat, seed, size, compare=False
                        )
                with mode:
                    sampled = torch.zeros(len(prompts), max_new_tokens, device=device)
                return [[3] * max_new_tokens for _ in prompts], sampled
            return real_rollout(
                policy, tokenizer, prompts, max_new_tokens, temperature, seed, size, compare=False
            )

        def some_micro_batches(module, indices, lengths, size, rank, world):
            """The first; where the script updates the first two, as the second finds gradients and is the last. The others are
            alike, and what is sent is counted for all. The second mini-batch ends the run."""
            found = micro_batches(indices, lengths, size, rank, world)
            update = tracker.phase() == "update" and module is script  # `models` has but forward passes
            return Some(one_by_one(found, update), 2 if update and len(found) > 1 else 1)

        def one_by_one(found, update):
            minis["update"] += update
            if minis["update"] > 1:
                raise Enough
            for model in loaded if update else ():  # as a later mini-batch finds them: sharded, the root too
                sharding.reshard(model)
            steps = getattr(args, "epochs", 1) * (
                args.batch_size // getattr(args, "mini_batch_size", args.batch_size)
            )
            outer, some = (steps, found[:2]) if update else (1, found[:1])
            tracker.steps = outer
            for i, pick in enumerate(some):
                tracker.weight = outer * (len(found) - i if i + 1 == len(some) else 1)
                yield pick
            tracker.weight = outer

        for module in (models, tokenization):
            put(module, "load_pretrained", load)
        real_load, real_adamw, real_copy = sharding.load_full, torch.optim.AdamW, offload.copy
        put(sharding, "load_full", load_full)
        put(offload, "copy", copy)
        run = mock.MagicMock()
        run.return_value.metrics = lambda *_, **__: (
            tracker.phase()
        )  # it may be the first to see that `until` has begun
        put(script, "Run", run)
        put(torch.optim, "AdamW", adamw)
        if hasattr(script, "rollout"):
            real_rollout = script.rollout
            put(script, "rollout", rollout)
            put(script, "check_sampler", lambda *_: None)
        if hasattr(script, "note_drift"):
            put(script, "note_drift", lambda *_: None)
        if fake:
            put(distributed, "device", lambda: torch.device(device))  # on a machine with a GPU too
            put(distributed, "all_gather_object", lambda value: [value] * gpus)
            for module in (script, batches):
                put(module, "micro_batches", functools.partial(some_micro_batches, module))
            dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
        else:
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        torch.manual_seed(args.seed)
        try:
            with tracker.watching(), contextlib.suppress(Enough):
                distributed.mesh(args.shard_size)
                script.main(args)
        finally:
            tracker.frame = None
            loaded.clear()
            distributed.mesh.cache_clear()
            gc.collect()
            dist.destroy_process_group()
    sent = {key: (tracker.sent[key], tracker.calls[key]) for key in tracker.sent}
    return Measured(
        tracker.cuda or dict(tracker.peaks), state, tracker.at_peak, sent, time.perf_counter() - begin, args
    )


@contextlib.contextmanager
def long_cache(length: int):
    """Key-value caches that, at the first token after the prompt, become `length` long, as at the last token."""
    from transformers.cache_utils import DynamicLayer

    sizes = DynamicLayer.get_mask_sizes

    def longer_sizes(layer, query_length):  # the mask is made before the layers' turn, and asks the first
        if query_length == 1 and layers and layers[0].room:
            for each in layers:
                lengthen(each)
            layers.clear()
        return sizes(layer, query_length)

    def lengthen(layer):  # by its own `update`, with views that hold no memory
        more = length - 1 - layer.get_seq_length()
        if more > 0:
            layer.update(*(x[:, :, :1].expand(-1, -1, more, -1) for x in (layer.keys, layer.values)))

    layers, made = [], rollout_room.roomy

    def roomy(config):
        cache = made(config)
        layers[:] = [layer for layer in cache.layers if isinstance(layer, rollout_room.RoomyLayer)]
        return cache

    with (
        mock.patch.object(DynamicLayer, "get_mask_sizes", longer_sizes),
        mock.patch.object(rollout_room, "roomy", roomy),
    ):
        yield


@dataclass
class Options:
    algorithm: Literal[
        "ppo", "dvpo", "grpo", "remax", "dpo", "kto", "rpo", "dro", "sft", "reward", "gvm_td"
    ] = "ppo"
    """the script; its own flags follow"""
    gpus: int = 8
    """ranks"""
    largest: int = 0
    """also list so many of the largest tensors at each phase's peak"""
    gpus_a_node: int = 8
    """collectives among more ranks, or among replicas, go over the network"""
    intra: float = 200.0
    """GB/s a GPU sends within a node (NVLink of an A100, in practice)"""
    inter: float = 20.0
    """GB/s a GPU sends between nodes (200 Gb/s a GPU, in practice)"""
    validate: bool = False
    """one real step on this device, one process, beside its plan"""
    table: bool = False
    """PPO, ReMax, GRPO and DVPO over a grid of settings, beside the figures of 2502.16944"""


def seconds(sent: dict, options: Options, shard_size: int) -> dict[str, float]:
    """Time of the collectives by phase, were none hidden behind computation: bytes a rank sends over the slowest link they
    cross. Sharding goes over `shard_size` neighbours; gradients of replicas and whatever all ranks share go over all nodes."""
    out, replicas = {}, options.gpus // (shard_size or options.gpus)
    for (phase, kind, ranks), (size, _) in sent.items():
        across = replicas > 1 and kind == "all-reduce"
        inside = options.gpus <= options.gpus_a_node or (ranks <= options.gpus_a_node and not across)
        out[phase] = out.get(phase, 0.0) + size / 1e9 / (options.intra if inside else options.inter)
    return out


def show(found: Measured, options: Options) -> None:
    print(
        f"{options.algorithm} on {options.gpus} GPUs, GB (2^30 bytes) a GPU, planned in {found.seconds:.0f} s"
    )
    for name, size in found.state.items():
        print(f"  {name:24} {size / GB:8.2f}")
    times = seconds(found.sent, options, found.args.shard_size)
    for phase in found.steps():
        print(f"{phase:10} peak {found.phases[phase] / GB:8.2f}")
        sums, counts = Counter(), Counter()
        for size, what in found.at_peak.get(phase, []):
            sums[what] += size
            counts[what] += 1
        for what, size in sums.most_common(options.largest):
            print(f"  {size / GB:8.3f}  {counts[what]:4} x {' '.join(map(str, what))}")
        for (where, kind, ranks), (size, calls) in found.sent.items():
            if where == phase and size > 1e6:
                print(f"  {kind} among {ranks}: a rank sends {size / 1e9:.1f} GB in {calls} calls")
        if times.get(phase, 0) > 0.01:
            print(f"  collectives: {times[phase]:.1f} s a step where nothing hides them")
    for line in found.idle(options.gpus):
        print(f"note: {line}")


def validate(options: Options, flags: list[str]) -> None:
    device = distributed.device().type
    real = measure(options.algorithm, flags, fake=False)
    planned = measure(options.algorithm, flags)
    print(
        f"{options.algorithm} on one {device} process, MB; planned in {planned.seconds:.0f} s, real step {real.seconds:.0f} s"
    )
    for phase in planned.steps():
        plan, got = planned.phases[phase], real.phases[phase]
        print(
            f"  {phase:10} plan {plan / 1e6:10.2f}  real {got / 1e6:10.2f}  error {100 * (plan / got - 1):+.2f} %"
        )


PAPER = {
    "Llama-3.2-3B": (41.43, 27.50),
    "Llama-3-8B": (78.96, 60.49),
}  # 2502.16944 v1, table 3: PPO and DVPO, 8 A100s


@functools.cache
def line(
    algorithm: str, model: str, depths: tuple[int, int], gpus: int, *flags: str, until: str = "log"
) -> dict[str, float]:
    """Peak bytes by phase of a step, from plans of two shallow models: linear in the number of layers, as soon as the peak lies
    among the layers and not before or behind them."""
    low, high = (
        measure(algorithm, ["--model", f"{model}@{depth}", *flags], gpus, until=until) for depth in depths
    )
    steps = (find_config(model).num_hidden_layers - depths[0]) / (depths[1] - depths[0])
    return {
        phase: low.phases[phase] + steps * (high.phases[phase] - low.phases[phase]) for phase in low.steps()
    }


def extrapolated(
    algorithm: str, model: str, flags: list[str], micro: list[str], gpus: int
) -> dict[str, float]:
    """As `measure` at full depth (the test compares), several times faster. A rollout's peak is among the layers from about the
    sixth on, and has nothing to do with `micro`, the flags of scoring and update alone."""
    rollout = line(algorithm, model, (8, 10), gpus, *flags, until="reward")
    return line(algorithm, model, (2, 4), gpus, *flags, *micro) | rollout


def table() -> None:
    """Whole grid, no selection. Reward model, critic and value model have the policy's size."""
    algorithms, length = ("ppo", "remax", "grpo", "dvpo"), 512
    print("| model | phase | micro-batch | checkpointing | PPO | ReMax | GRPO | DVPO | DVPO / PPO |")
    print("|---" * 9 + "|")

    def row(*cells):
        print("| " + " | ".join(cells), "|", flush=True)

    for model, (ppo, dvpo) in PAPER.items():
        row(model, "2502.16944", "", "", f"{ppo:.1f}", "", "", f"{dvpo:.1f}", f"{dvpo / ppo:.2f}")
        for micro, recompute in [(micro, recompute) for micro in (1, 4, 16) for recompute in (True, False)]:
            flags = f"--batch-size 256 --mini-batch-size 256 --rollout-batch-size 16 --max-prompt-length {length}".split()
            flags += ["--max-response-length", str(length)]
            more = ["--micro-batch-size", str(micro)] + ["--gradient-checkpointing"] * recompute
            found = [extrapolated(algorithm, model, flags, more, 8) for algorithm in algorithms]
            for phase in ("rollout", "update"):
                peaks = [peaks[phase] / GB for peaks in found]
                setting = ("any", "any") if phase == "rollout" else (str(micro), "on" if recompute else "off")
                if phase == "update" or (micro, recompute) == (1, True):
                    row(
                        model,
                        phase,
                        *setting,
                        *(f"{peak:.1f}" for peak in peaks),
                        f"{peaks[3] / peaks[0]:.2f}",
                    )


def main() -> None:
    options, flags = tyro.cli(Options, return_unknown_args=True)
    if options.table:
        table()
    elif options.validate:
        validate(options, flags)
    else:
        show(measure(options.algorithm, flags, options.gpus), options)


if __name__ == "__main__":
    main()
