"""Memory of a run on N GPUs, by phase, without a GPU and without weights: the script's own `main` with fake
tensors.

    python tools/plan_memory.py --algorithm ppo --gpus 8 --model Llama-3-8B --batch-size 64 \
        --mini-batch-size 64 --micro-batch-size 1 --max-prompt-length 512 --max-response-length 512 \
        --gradient-checkpointing
    python tools/plan_memory.py --table                      # `make plan`: next to 2502.16944's figures
    python tools/plan_memory.py --validate --algorithm dvpo  # one real step on this device, next to its plan

Every flag that is not listed by --help is the script's own. Model names (`--model`, `--reward`, `--critic`,
`--gvm`) are presets or folders with a config.json. docs/memory.md says what is modelled, and how far the plan
is from real steps.

Top to bottom: the configurations by name, the tracker that counts bytes, what the planner puts in place of
functions of common/ (a list), one measured step, and what is printed of it.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple
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
from transformers.cache_utils import DynamicLayer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import batches, checks, distributed, models, offload, rewards, sharding, templates, tokenization
from common import rollout as rollout_room
from common.batches import micro_batches
from common.cli import fail, parse
from common.tables import line_of, markdown

GB = 2**30
aten = torch.ops.aten


# --- configurations by name ---------------------------------------------------------------------------------


def llama(
    hidden: int, ffn: int, layers: int, heads: int, head_dim: int = 128, tied: bool = False
) -> transformers.LlamaConfig:
    """A Llama 3: all sizes have 8 heads of keys and values."""
    return transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        rope_theta=500000.0,
        max_position_embeddings=131072,
    )


def qwen(
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int = 152064,
    tied: bool = False,
) -> transformers.Qwen2Config:
    """A Qwen2.5."""
    return transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
    )


# The published config.json of each. Called for a fresh one each time, because find_config may cut its layers.
PRESETS: dict[str, Callable] = {
    "Llama-3.2-1B": functools.partial(
        llama, hidden=2048, ffn=8192, layers=16, heads=32, head_dim=64, tied=True
    ),
    "Llama-3.2-3B": functools.partial(llama, hidden=3072, ffn=8192, layers=28, heads=24, tied=True),
    "Llama-3-8B": functools.partial(llama, hidden=4096, ffn=14336, layers=32, heads=32),
    "Llama-3-70B": functools.partial(llama, hidden=8192, ffn=28672, layers=80, heads=64),
    "Qwen2.5-0.5B": functools.partial(
        qwen, hidden=896, ffn=4864, layers=24, heads=14, kv_heads=2, vocabulary=151936, tied=True
    ),
    "Qwen2.5-7B": functools.partial(qwen, hidden=3584, ffn=18944, layers=28, heads=28, kv_heads=4),
    "Qwen2.5-14B": functools.partial(qwen, hidden=5120, ffn=13824, layers=48, heads=40, kv_heads=8),
    "Qwen2.5-32B": functools.partial(qwen, hidden=5120, ffn=27648, layers=64, heads=40, kv_heads=8),
}


def find_config(name: str) -> transformers.PretrainedConfig:
    """A preset's or folder's configuration; of "Llama-3-8B@4" with 4 layers. Ends the plan where there is
    neither."""
    name, _, layers = name.partition("@")
    if name in PRESETS:
        config = PRESETS[name]()
    elif Path(name, "config.json").is_file():
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    else:
        fail(f"{name}: neither a folder with a config.json nor one of {', '.join(PRESETS)}")
    if layers:
        config.num_hidden_layers = int(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


# --- counting bytes -----------------------------------------------------------------------------------------


class Enough(BaseException):
    """Ends `main` where it would only repeat itself. No Exception, so that nothing on the way catches it."""


@dataclass
class Storage:
    """A live block of memory."""

    size: int
    """bytes"""
    what: tuple
    """(operation, type, shape) of the tensor that made it"""


class Collective(NamedTuple):
    phase: str
    kind: str
    """all-gather, reduce-scatter, all-reduce or broadcast"""
    ranks: int


class Sent(NamedTuple):
    size: int
    """bytes that one rank sends in a step"""
    calls: int


# By a part of the operation's name; the first that fits, because reduce_scatter has both of the words.
COLLECTIVES = {
    "gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "reduce": "all-reduce",
    "broadcast": "broadcast",
}


def kind_of(operation: str) -> str:
    """Which collective an operation is; '' for any other."""
    for part, kind in COLLECTIVES.items():
        if part in operation:
            return kind
    return ""


def in_blocks(size: int) -> int:
    """Bytes rounded up to multiples of 512, as in CUDA's allocator."""
    return -(-size // 512) * 512


def local(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's part of each tensor."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def constant(dtype: torch.dtype):
    """What a fake tensor of a type is said to hold, where a script asks for its value."""
    if dtype == torch.bool:
        return True
    if dtype.is_floating_point:
        return 1.0
    return 1


def places(mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The indices of a mask's true entries, one tensor per dimension; of a fake mask all entries."""
    if isinstance(mask, FakeTensor):
        mask = torch.ones(mask.shape, dtype=torch.bool)
    return mask.nonzero().unbind(1)


def without_masks(indices: list) -> list:
    """Indices in which each mask is replaced by the indices of its true entries."""
    out = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            out.extend(places(index))
        else:
            out.append(index)
    return out


class Tracker(TorchDispatchMode):
    """Bytes of live storage and their peak by phase, and what a rank sends.

    A phase is what the script's own banners (`# --- rollout`) name, read from the line at which `main`
    stands. With `fake`, the tracker also answers what fake tensors cannot: their values (a constant), and how
    many entries a mask selects (all).
    """

    def __init__(self, main: Callable, device: str, fake: FakeTensorMode | None, until: str):
        super().__init__()
        self.code = main.__code__
        self.device = device  # "cpu" or "cuda"
        self.fake = fake
        self.until = until  # the phase that ends the run
        self.frame = None  # of `main`, once it runs

        # where the banners stand: line numbers, and the phases that begin there
        self.banner_lines = []
        self.banner_names = []
        lines, first = inspect.getsourcelines(main)
        for number, line in enumerate(lines, first):
            banner = re.match(r"\s*# --- (\w+)$", line)
            if banner:
                self.banner_lines.append(number)
                self.banner_names.append(banner[1])

        self.live: dict[int, Storage] = {}
        self.total = 0  # bytes that are live now
        self.peaks = Counter()  # bytes by phase
        self.at_peak = {}  # by phase: (bytes, what) of each storage that was live
        self.new_peak = None  # the phase of a peak whose storages are not written down yet
        self.now = "setup"
        self.cuda = {}  # peaks by phase, as CUDA's allocator counts them

        self.sent = Counter()  # bytes by Collective
        self.calls = Counter()
        self.weight = 1  # how many micro-batches the one that runs now stands for
        self.steps = 1  # how many mini-batches it stands for

    def phase(self) -> str:
        """Where `main` stands. Raises Enough where the phase `until` has begun."""
        if self.frame is None:
            frame = sys._getframe()
            while frame is not None and frame.f_code is not self.code:
                frame = frame.f_back
            self.frame = frame
        name = "setup"
        if self.frame:
            banners_above = bisect.bisect_right(self.banner_lines, self.frame.f_lineno)
            if banners_above:
                name = self.banner_names[banners_above - 1]
        if name != self.now and self.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
            self.cuda[self.now] = max(self.cuda.get(self.now, 0), peak)
            torch.cuda.reset_peak_memory_stats()
        self.now = name
        if name == self.until:
            raise Enough
        return name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Every operation on tensors comes by here."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local operations come by again
        active = active_fake_mode()
        if active is not None and active is not self.fake:
            return func(*args, **kwargs)  # DTensor's own, to find the shape of a result
        phase = self.phase()
        if func in fake_collectives.collective_ops and func not in fake_collectives.sync_ops:
            self.count(phase, func, args, kwargs)
        if self.fake:
            if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
                return constant(args[0].dtype)
            if func is aten.nonzero.default and isinstance(args[0], FakeTensor):
                return torch.ones(args[0].shape, dtype=torch.bool).nonzero()
            if func is aten.index.Tensor and any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args)):
                args = (args[0], without_masks(args[1]))
            if func is aten.empty.memory_format and active is None and len(args[0]) == 1 and args[0][0] > 512:
                with self.fake:  # the flat buffer that FSDP gathers into
                    return self.track(func(*args, **kwargs), phase, func)
        return self.track(func(*args, **kwargs), phase, func)

    def track(self, out, phase: str, func):
        """Writes down the storages of an operation's results that are new."""
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != self.device:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.live:
                continue  # a view, or an operation in place
            self.live[key] = Storage(0, (str(func), str(tensor.dtype), tuple(tensor.shape)))
            weakref.finalize(storage, self.resize, key, None)
            self.resize(key, storage.nbytes(), phase)
        return out

    def resize(self, key: int, size: int | None, phase: str | None = None) -> None:
        """A storage is created, resized, or (None) freed."""
        storage = self.live[key]
        new_size = in_blocks(size or 0)
        if new_size < storage.size and self.new_peak:
            # the first bytes that go after a peak: what is live now is what the peak was made of
            self.at_peak[self.new_peak] = [
                (other.size, other.what) for other in self.live.values() if other.size
            ]
            self.new_peak = None
        self.total += new_size - storage.size
        storage.size = new_size
        if size is None:
            del self.live[key]
            return
        phase = phase or self.phase()
        if self.total > self.peaks[phase]:
            self.peaks[phase] = self.total
            self.new_peak = phase

    @contextlib.contextmanager
    def watching(self):
        """Inside, all operations are counted, and FSDP's resizing too, which is no operation."""
        resize = torch.UntypedStorage.resize_  # FSDP frees and refills by this what it gathers

        def watched(storage, size):
            resize(storage, size)
            if storage._cdata in self.live:
                self.resize(storage._cdata, size)
            return storage

        with mock.patch.object(torch.UntypedStorage, "resize_", watched), self:
            yield

    def count(self, phase: str, func, args, kwargs) -> None:
        """Bytes a rank sends in a collective, by the ring algorithms: (n - 1) / n of the tensor, of an
        all-reduce twice that."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
        try:
            ranks = fake_collectives.CollectiveOp.get_process_group(func, args).size()
        except (TypeError, ValueError, IndexError, RuntimeError):
            ranks = dist.get_world_size()
        key = Collective(phase, kind_of(str(func)), ranks)
        weight = self.weight
        times = 1
        if key.kind == "all-reduce":
            weight = min(weight, self.steps)  # replicas add their gradients once per mini-batch
            times = 2
        self.sent[key] += weight * size * times * (ranks - 1) // ranks
        self.calls[key] += weight


@dataclass
class Measured:
    """What one step takes on rank 0."""

    phases: dict[str, int]
    """peak bytes by phase: of a real step on a GPU by CUDA's allocator"""
    state: dict[str, int]
    """bytes of weights by model, of gradients and of the optimizers"""
    at_peak: dict[str, list]
    """live storages at each phase's peak: (bytes, (operation, type, shape))"""
    sent: dict[Collective, Sent]
    """what a rank sends in a step"""
    seconds: float
    """that measuring took"""
    args: object
    """the script's Args"""

    def steps(self) -> list[str]:
        """The phases of a step. What comes before holds copies of the weights on the host, which are no
        memory of a GPU."""
        return [phase for phase in self.phases if phase not in ("setup", "data", "models", "log", "save")]

    def idle(self, gpus: int) -> list[str]:
        """What has come apart at so many ranks, a line each."""
        batch = self.args.batch_size
        sizes = {"batch": batch, "mini-batch": getattr(self.args, "mini_batch_size", batch)}
        lines = []
        for name, size in sizes.items():
            if size < gpus:
                lines.append(f"a {name} of {size} leaves {gpus - size} of {gpus} ranks without a sequence")
        return lines


# --- one step, with parts of common/ replaced ---------------------------------------------------------------


class Tokenizer:
    """Token lists of a wanted length: the text "17 512" is number 17, 512 tokens."""

    pad_token_id = 0
    eos_token_id = 1
    bos_token_id = 2
    unk_token_id = None
    chat_template = None
    all_special_ids = (0, 1, 2)
    added_tokens_decoder = {}

    def __call__(self, text: str, **_):
        if text == templates.PROBE:
            text = "0 1"
        number, length = map(int, text.split())
        # the number in base 32, so that texts differ where their numbers do; then the same token over and
        # over
        digits = [3 + (number >> 5 * i) % 32 for i in range(min(4, length))]
        return {"input_ids": digits + [3] * (length - 4)}

    def get_vocab(self):
        return {}

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"

    def batch_decode(self, responses, **_):
        return [f"0 {len(response)}" for response in responses]


def encode_apart(tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """In place of `encode_plain`: two texts of `Tokenizer` are no text together."""
    return tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]


@dataclass
class Counted:
    """An iterator that knows how many it will yield: the scripts ask for the `len` of their micro-batches."""

    picks: Iterator
    number: int

    def __iter__(self):
        return self.picks

    def __len__(self):
        return self.number


class Replacements:
    """What takes the place of functions of common/ while a script's `main` is measured.

    Replaced by name, so these names must stay where they are:

        room                  function           why
        models, tokenization, load_pretrained    a preset has no files: a configuration, no weights
          the script
        tokenization          generation_ends    and no generation config
        tokenization, rewards encode_plain       a text is a number of tokens
        sharding              load_full          nothing to read; the shards' bytes are written down
        offload               copy               between fake tensors there is nothing to copy
        distributed           device             fake tensors are on the CPU, on a machine with a GPU too
        distributed           all_gather_object  there are no other ranks: each is said to have the same
        batches, the script   micro_batches      one or two stand for all, which are alike
        rollout               roomy              (in `long_cache`) the cache of the last token at once
        the script            Run                nothing is logged
        the script            rollout            the first and the last token stand for all
        the script            check_sampler,     they compare numbers, which fake tensors have not
                              note_drift
        checks                check_policy,      the same
                              check_head
        checks                forbidden_tokens   the tokenizer has no vocabulary: the padding alone
        torch.optim           AdamW              its state is there from the start, as in a later step

    `device`, `all_gather_object` and `micro_batches` stay as they are in a real step.
    """

    def __init__(self, script, args, tracker: Tracker, gpus: int):
        self.script = script
        self.args = args
        self.tracker = tracker
        self.gpus = gpus
        self.fake = tracker.fake  # None: a real step
        self.state = {}  # bytes by name
        self.loaded = []  # models
        self.mini_batches = 0  # that updates have begun

        self.real_load_full = sharding.load_full
        self.real_copy = offload.copy
        self.real_adamw = torch.optim.AdamW
        self.real_rollout = getattr(script, "rollout", None)

    def install(self, stack: contextlib.ExitStack) -> None:
        """Puts all in place, until `stack` is left."""

        def put(where, name, replacement):
            stack.enter_context(mock.patch.object(where, name, replacement))

        put(models, "load_pretrained", self.load_pretrained)
        put(tokenization, "load_pretrained", self.load_pretrained)
        if hasattr(self.script, "load_pretrained"):
            put(self.script, "load_pretrained", self.load_pretrained)
        put(tokenization, "generation_ends", no_ends)
        put(tokenization, "encode_plain", encode_apart)
        put(rewards, "encode_plain", encode_apart)
        put(sharding, "load_full", self.load_full)
        put(offload, "copy", self.copy)
        put(models, "check_numbers", nothing)  # there are none
        put(checks, "check_policy", nothing)
        put(checks, "check_head", self.check_head)
        put(checks, "forbidden_tokens", self.forbidden_tokens)
        put(torch.optim, "AdamW", self.adamw)
        run = mock.MagicMock()
        run.return_value.metrics = self.metrics
        run.return_value.saves.return_value = False
        put(self.script, "Run", run)
        if hasattr(self.script, "rollout"):
            put(self.script, "rollout", self.rollout)
            put(self.script, "check_sampler", nothing)
        if hasattr(self.script, "note_drift"):
            put(self.script, "note_drift", nothing)
        if self.fake:
            put(distributed, "device", self.device)
            put(distributed, "wait_for_rank_0", nothing)
            put(distributed, "all_gather_object", self.all_gather_object)
            put(self.script, "micro_batches", self.micro_batches_of_the_script)
            put(batches, "micro_batches", self.micro_batches_of_a_pass)

    def load_pretrained(self, what, auto, name, config=None, output_loading_info=False, **options):
        """The tokenizer, configuration or model `name`, a model without weights."""
        if what == "tokenizer":
            find_config(name)  # ends the plan where there is no such model
            return Tokenizer()
        if what == "configuration":
            return find_config(name)
        with torch.device("meta" if self.fake else "cpu"):
            model = auto.from_config(config, dtype=options["dtype"])
        return model, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    def check_head(self, model, *_) -> None:
        """A decoder, as all presets are."""
        model.needs_mask = False
        model.needs_types = False

    def forbidden_tokens(self, policy, tokenizer, width) -> torch.Tensor:
        """The padding."""
        return torch.tensor([tokenizer.pad_token_id], device=distributed.device())

    def load_full(self, model, source) -> None:
        """The shards of a model: fake ones, or real ones of random weights."""
        if self.fake:
            with self.fake:
                model.to_empty(device=self.tracker.device)
                model.tie_weights()
        else:
            self.real_load_full(model, source)
        self.loaded.append(model)
        name = type(model).__name__
        if "Token" in name:
            kind = "value"
        elif "Sequence" in name:
            kind = "reward"
        else:
            kind = "policy"
        use = "frozen" if model.frozen else "trained"
        self.count_state(f"{kind} model, {use}", model.parameters())

    def count_state(self, name: str, tensors: Iterable[torch.Tensor]) -> None:
        """Adds this rank's bytes of some tensors to those that have the same name."""
        size = sum(tensor.nbytes for tensor in local(tensors))
        self.state[name] = self.state.get(name, 0) + size

    def copy(self, to, source) -> None:
        """Of parked weights to the host and back; unseen by the tracker, for which on a CPU the two are
        one."""
        if self.fake:
            return
        with _disable_current_modes():
            self.real_copy(to, source)

    def adamw(self, parameters, **options):
        """An optimizer that has made a step with gradients of 0."""
        parameters = list(parameters)
        optimizer = self.real_adamw(parameters, **options)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.count_state("gradients", [parameter.grad for parameter in parameters])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
        self.count_state("optimizer", moments)
        return optimizer

    def metrics(self, *_, **__) -> None:
        """Logs nothing, but may be the first to see that the phase `until` has begun."""
        self.tracker.phase()

    def rollout(self, policy, tokenizer, prompts, max_new_tokens, temperature, seed, size=0, compare=True):
        """The script's rollout, unchecked. A plan's generates the first token and, with a long cache, the
        last; of many chunks it makes the first two."""
        rollout_room.COMPARED.add(policy)
        if not self.fake:
            return self.real_rollout(
                policy, tokenizer, prompts, max_new_tokens, temperature, seed, size, compare=False
            )
        some = prompts[: 2 * self.gpus * size] if size else prompts
        heat = temperature[: len(some)] if isinstance(temperature, list) else temperature
        tokens = min(2, max_new_tokens)

        def gather(found):
            """One made-up token per prompt, for what the other ranks would have sampled."""
            return [dict.fromkeys(range(len(some)), ([3], [0.0]))]

        longest = max(len(prompt) for prompt in prompts)
        gathering = mock.patch.object(distributed, "all_gather_object", gather)
        with long_cache(longest + max_new_tokens - 1), gathering:
            self.real_rollout(policy, tokenizer, some, tokens, heat, seed, size, compare=False)
        with self.fake:
            sampled = torch.zeros(len(prompts), max_new_tokens, device=self.tracker.device)
        return [[3] * max_new_tokens for _ in prompts], sampled

    def device(self) -> torch.device:
        return torch.device(self.tracker.device)

    def all_gather_object(self, value) -> list:
        return [value] * self.gpus

    def micro_batches_of_a_pass(self, indices, lengths, size, rank, world) -> Counted:
        """Of a pass without gradients the first stands for all: the others are alike."""
        found = micro_batches(indices, lengths, size, rank, world)
        self.tracker.phase()
        return Counted(self.one_of(found), 1)

    def micro_batches_of_the_script(self, indices, lengths, size, rank, world) -> Counted:
        """Of an update the first two stand for all: the second finds gradients, and is the last."""
        found = micro_batches(indices, lengths, size, rank, world)
        if self.tracker.phase() != "update":
            return Counted(self.one_of(found), 1)
        return Counted(self.two_of(found), 2 if len(found) > 1 else 1)

    def one_of(self, found: list) -> Iterator:
        """The first micro-batch; what it sends counts for all of them."""
        self.tracker.steps = 1
        for pick in found[:1]:
            self.tracker.weight = len(found)
            yield pick
        self.tracker.weight = 1

    def two_of(self, found: list) -> Iterator:
        """The first two micro-batches of an update; what they send counts for all of the step. A second
        mini-batch ends the run."""
        self.mini_batches += 1
        if self.mini_batches > 1:
            raise Enough
        for model in self.loaded:
            sharding.reshard(model)  # as a later mini-batch finds them: sharded, the root too
        mini_batch_size = getattr(self.args, "mini_batch_size", self.args.batch_size)
        steps = self.args.epochs * (self.args.batch_size // mini_batch_size)
        self.tracker.steps = steps
        last = len(found[:2]) - 1
        for i, pick in enumerate(found[:2]):
            stands_for = len(found) - i if i == last else 1
            self.tracker.weight = steps * stands_for
            yield pick
        self.tracker.weight = steps


def nothing(*_, **__) -> None:
    """In place of a check."""


def no_ends(*_) -> list[int]:
    """Of a generation config: only eos ends a response."""
    return []


@contextlib.contextmanager
def long_cache(length: int):
    """Key-value caches that, at the first token after the prompt, become `length` long, as at the last
    token."""
    real_roomy = rollout_room.roomy
    real_sizes = DynamicLayer.get_mask_sizes
    short = []  # layers of the cache that was made last, until they are lengthened

    def roomy(config):
        cache = real_roomy(config)
        short[:] = [layer for layer in cache.layers if isinstance(layer, rollout_room.RoomyLayer)]
        return cache

    def get_mask_sizes(layer, query_length):
        """The mask is made before the layers' turn, and asks the first of them."""
        if query_length == 1 and short and short[0].room:
            for each in short:
                lengthen(each)
            short.clear()
        return real_sizes(layer, query_length)

    def lengthen(layer):
        """By its own `update`, with views that hold no memory."""
        more = length - 1 - layer.get_seq_length()
        if more > 0:
            keys = layer.keys[:, :, :1].expand(-1, -1, more, -1)
            values = layer.values[:, :, :1].expand(-1, -1, more, -1)
            layer.update(keys, values)

    with (
        mock.patch.object(DynamicLayer, "get_mask_sizes", get_mask_sizes),
        mock.patch.object(rollout_room, "roomy", roomy),
    ):
        yield


def prepare(algorithm: str, flags: list[str], folder: str):
    """The script's module and its Args, with data made up to the lengths asked for."""
    script = importlib.import_module(algorithm)
    data = Path(folder, "rows.jsonl")
    usual = []  # defaults of a plan; `flags` may say otherwise
    if hasattr(script.Args, "eval_every"):
        usual += ["--eval-every", "0"]
    if hasattr(script.Args, "eval_prompts"):
        usual += ["--eval-prompts", "0"]
    if hasattr(script.Args, "precision"):
        usual += ["--precision", "bf16"]
    fixed = ["--dataset", str(data), "--run-dir", f"{folder}/run", "--overwrite"]
    args = parse(script.Args, {}, [*usual, *flags, *fixed])
    if algorithm != "gvm_td":  # its rewards are in the rows
        for name in ("reward", "gvm"):
            if getattr(args, name, None) in ("", "reviews"):
                setattr(args, name, args.model)  # where none is named, a model of the policy's size
    args.epochs = getattr(args, "epochs", 1)
    args.seed = 0
    Path(args.run_dir).mkdir()
    write_rows(data, args)
    return script, args


def write_rows(path: Path, args) -> None:
    """Rows that any script can read, in the texts of `Tokenizer`."""
    rows = 4 * args.batch_size + 64
    with open(path, "w") as file:
        for i in range(rows):
            prompt = i // 2  # each prompt has two responses
            # ragged by one token: equal lengths would need no mask
            prompt_length = args.max_prompt_length - prompt % 2
            response = f"{i} {args.max_response_length - 1}"
            row = {
                "prompt": f"{prompt} {prompt_length}",
                "label": bool(i % 2),
                "reward": float(i // 4 % 2 + i % 2),
                "response": response,
                "chosen": response,
                # another text of this length: a pair of equal answers teaches nothing and is dropped
                "rejected": f"{rows + i} {args.max_response_length - 1}",
            }
            file.write(json.dumps(row) + "\n")


def measure(
    algorithm: str, flags: list[str], gpus: int = 1, fake: bool = True, until: str = "log"
) -> Measured:
    """One step of the script's `main` on rank 0 of `gpus`: with fake tensors, or really, with random weights,
    on this device. It ends where the phase `until` begins."""
    begin = time.perf_counter()
    device = "cpu" if fake else distributed.device().type
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        script, args = prepare(algorithm, flags, folder)
        if getattr(args, "rollout_engine", "torch") != "torch":
            fail("the planner counts our own loop; leave out --rollout-engine")
        mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
        tracker = Tracker(script.main, device, mode, until)
        replacements = Replacements(script, args, tracker, gpus)
        replacements.install(stack)
        if fake:
            dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
        else:
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        torch.manual_seed(args.seed)
        try:
            with tracker.watching(), contextlib.suppress(Enough):
                distributed.mesh(args.shard_size)
                script.main(args)
        finally:
            # the models must go before the process group does: neither the frame nor the list may hold them
            tracker.frame = None
            replacements.loaded.clear()
            distributed.mesh.cache_clear()
            gc.collect()
            dist.destroy_process_group()
    return Measured(
        phases=tracker.cuda or dict(tracker.peaks),
        state=replacements.state,
        at_peak=tracker.at_peak,
        sent={key: Sent(tracker.sent[key], tracker.calls[key]) for key in tracker.sent},
        seconds=time.perf_counter() - begin,
        args=args,
    )


# --- what is printed ----------------------------------------------------------------------------------------


@dataclass
class Options:
    algorithm: Literal[
        "ppo", "dvpo", "grpo", "remax", "dpo", "kto", "rpo", "dro", "sft", "reward", "gvm_td"
    ] = "ppo"
    """The script to plan for; its own flags follow."""
    gpus: int = 8
    """How many ranks train together."""
    largest: int = 0
    """Also list so many of the largest tensors at each phase's peak."""
    gpus_a_node: int = 8
    """GPUs per node: collectives among more ranks, or among replicas, go over the network."""
    intra: float = 200.0
    """GB/s that a GPU sends within a node (NVLink of an A100, in practice)."""
    inter: float = 20.0
    """GB/s that a GPU sends between nodes (200 Gb/s per GPU, in practice)."""
    validate: bool = False
    """Make one real step on this device, in one process, and compare it with its plan."""
    table: bool = False
    """Plan PPO, ReMax, GRPO and DVPO over a grid of settings, compared with the figures of 2502.16944."""


def seconds(sent: dict[Collective, Sent], options: Options, shard_size: int) -> dict[str, float]:
    """Time of the collectives by phase, were none hidden behind computation: bytes a rank sends over the
    slowest link they cross. Sharding goes over `shard_size` neighbours; gradients of replicas and whatever
    all ranks share go over all nodes."""
    out = {}
    replicas = options.gpus // (shard_size or options.gpus)
    for collective, amount in sent.items():
        among_replicas = replicas > 1 and collective.kind == "all-reduce"
        one_node = options.gpus <= options.gpus_a_node
        inside = one_node or (collective.ranks <= options.gpus_a_node and not among_replicas)
        rate = options.intra if inside else options.inter
        out[collective.phase] = out.get(collective.phase, 0.0) + amount.size / 1e9 / rate
    return out


def show(found: Measured, options: Options) -> None:
    """The plan of one run."""
    unit = "GB (2^30 bytes) a GPU"
    print(f"{options.algorithm} on {options.gpus} GPUs, {unit}, planned in {found.seconds:.0f} s")
    for name, size in found.state.items():
        print(f"  {name:24} {size / GB:8.2f}")
    times = seconds(found.sent, options, found.args.shard_size)
    for phase in found.steps():
        print(f"{phase:10} peak {found.phases[phase] / GB:8.2f}")
        show_largest(found.at_peak.get(phase, []), options.largest)
        for collective, amount in found.sent.items():
            if collective.phase == phase and amount.size > 1e6:
                among = f"{collective.kind} among {collective.ranks}"
                print(f"  {among}: a rank sends {amount.size / 1e9:.1f} GB in {amount.calls} calls")
        if times.get(phase, 0) > 0.01:
            print(f"  collectives: {times[phase]:.1f} s a step where nothing hides them")
    for line in found.idle(options.gpus):
        print(f"note: {line}")


def show_largest(storages: list[tuple[int, tuple]], number: int) -> None:
    """The kinds of tensors that take the most together."""
    sizes = Counter()
    counts = Counter()
    for size, what in storages:
        sizes[what] += size
        counts[what] += 1
    for what, size in sizes.most_common(number):
        print(f"  {size / GB:8.3f}  {counts[what]:4} x {' '.join(map(str, what))}")


def validate(options: Options, flags: list[str]) -> None:
    """One real step on this device, compared with its plan."""
    device = distributed.device().type
    real = measure(options.algorithm, flags, fake=False)
    planned = measure(options.algorithm, flags)
    times = f"planned in {planned.seconds:.0f} s, real step {real.seconds:.0f} s"
    print(f"{options.algorithm} on one {device} process, MB; {times}")
    for phase in planned.steps():
        plan = planned.phases[phase]
        got = real.phases[phase]
        error = 100 * (plan / got - 1)
        print(f"  {phase:10} plan {plan / 1e6:10.2f}  real {got / 1e6:10.2f}  error {error:+.2f} %")


# 2502.16944 v1, table 3: GB per GPU, 8 A100s
PAPER = {
    "Llama-3.2-3B": {"ppo": 41.43, "dvpo": 27.50},
    "Llama-3-8B": {"ppo": 78.96, "dvpo": 60.49},
}


@functools.cache
def line(
    algorithm: str, model: str, depths: tuple[int, int], gpus: int, *flags: str, until: str = "log"
) -> dict[str, float]:
    """Peak bytes by phase of a step, from plans of two shallow models: linear in the number of layers, as
    soon as the peak lies among the layers and not before or behind them."""
    shallow, deep = depths
    low = measure(algorithm, ["--model", f"{model}@{shallow}", *flags], gpus, until=until)
    high = measure(algorithm, ["--model", f"{model}@{deep}", *flags], gpus, until=until)
    steps = (find_config(model).num_hidden_layers - shallow) / (deep - shallow)
    out = {}
    for phase in low.steps():
        out[phase] = low.phases[phase] + steps * (high.phases[phase] - low.phases[phase])
    return out


def extrapolated(
    algorithm: str, model: str, flags: list[str], micro: list[str], gpus: int
) -> dict[str, float]:
    """As `measure` at full depth (the test compares), several times faster. A rollout's peak is among the
    layers from about the sixth on, and has nothing to do with `micro`, the flags of scoring and update
    alone."""
    rollout = line(algorithm, model, (8, 10), gpus, *flags, until="reward")
    everything = line(algorithm, model, (2, 4), gpus, *flags, *micro)
    return everything | rollout


def print_row(*cells: str) -> None:
    """One row of a Markdown table, as soon as it is known."""
    print(line_of(cells), flush=True)


def table() -> None:
    """The whole grid, nothing selected. Reward model, critic and value model have the policy's size."""
    algorithms = ("ppo", "remax", "grpo", "dvpo")
    flags = ["--batch-size", "256", "--mini-batch-size", "256", "--rollout-batch-size", "16"]
    flags += ["--max-prompt-length", "512", "--max-response-length", "512"]
    head = ["model", "phase", "micro-batch", "checkpointing", "PPO", "ReMax", "GRPO", "DVPO", "DVPO / PPO"]
    print(markdown(head, []))
    for model, paper in PAPER.items():
        ratio = paper["dvpo"] / paper["ppo"]
        print_row(
            model, "2502.16944", "", "", f"{paper['ppo']:.1f}", "", "", f"{paper['dvpo']:.1f}", f"{ratio:.2f}"
        )
        rollout_shown = False  # it is the same for all micro-batches
        for micro in (1, 4, 16):
            for checkpointing in (True, False):
                more = ["--micro-batch-size", str(micro)]
                if checkpointing:
                    more.append("--gradient-checkpointing")
                found = {name: extrapolated(name, model, flags, more, 8) for name in algorithms}
                if not rollout_shown:
                    print_row(model, "rollout", "any", "any", *peaks_of(found, "rollout"))
                    rollout_shown = True
                setting = "on" if checkpointing else "off"
                print_row(model, "update", str(micro), setting, *peaks_of(found, "update"))


def peaks_of(found: dict[str, dict[str, float]], phase: str) -> list[str]:
    """Cells of the table: the peak of a phase in GB by algorithm, and DVPO's over PPO's."""
    peaks = {name: phases[phase] / GB for name, phases in found.items()}
    ratio = peaks["dvpo"] / peaks["ppo"]
    return [*(f"{peak:.1f}" for peak in peaks.values()), f"{ratio:.2f}"]


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
