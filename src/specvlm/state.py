"""What one answer carries from round to round: its KV slab, its length, what the last round emitted."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specvlm.config import GenerateConfig
from specvlm.graphs import PLAIN_DESK, Desk
from specvlm.memory import free_bytes
from specvlm.tree import BUCKETS, DraftTree, root_only
from specvlm_kernels import Accepted, accept, compact_kv, draw

#: A slab's capacity is a multiple of this, so that prompts of about one length share slabs and graphs.
SLAB_STEP = 256
#: What slabs that wait for another answer may hold: 8192 positions of a 7B target in bf16.
IDLE_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. Numbers serve the whole batch; a [B] tensor sets each row's own.

    Attributes:
        temperature, top_k, top_p: as in `GenerateConfig`.
        seed: [B] int64 on the device.
    """

    temperature: float | Tensor
    top_k: int | Tensor
    top_p: float | Tensor
    seed: Tensor

    @classmethod
    def of(cls, config: GenerateConfig, seed: int, batch: int, device: torch.device) -> "Sampling":
        """The settings of `config` for `batch` prompts; row b draws with seed + b."""
        seeds = torch.tensor([_wrapped(seed + b) for b in range(batch)], dtype=torch.int64)
        return cls(config.temperature, config.top_k, config.top_p, seeds.to(device, non_blocking=True))

    def on(self, desk: Desk) -> "Sampling":
        """The same settings as tensors that lie on a desk that records, but for those that are off."""
        if not desk.records:
            return self
        given = ("temperature", self.temperature, 0, torch.float32), ("top_k", self.top_k, 0, torch.int64)
        settings = [self._kept(desk, *one) for one in (*given, ("top_p", self.top_p, 1, torch.float32))]
        return Sampling(*settings, *desk.keep("seed", self.seed))

    def _kept(self, desk: Desk, name: str, setting: Any, off: float, dtype: torch.dtype) -> Any:
        if not isinstance(setting, Tensor):
            if setting == off:
                return setting
            setting = torch.full(self.seed.shape, setting, dtype=dtype, device=self.seed.device)
        return desk.keep(name, setting)[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the settings that are tensors."""
        settings = self.temperature, self.top_k, self.top_p, self.seed
        return tuple(setting for setting in settings if isinstance(setting, Tensor))

    @property
    def numbers(self) -> tuple[float | None, ...]:
        """The settings, None where one is a tensor."""
        settings = self.temperature, self.top_k, self.top_p
        return tuple(None if isinstance(setting, Tensor) else setting for setting in settings)

    def draw(self, logits: Tensor, positions: Tensor) -> Tensor:
        """The target's draws [B, N] from logits [B, N, V] of nodes at `positions` [B, N]."""
        return draw(logits, positions, **self._settings())

    def accept(self, tree: DraftTree, logits: Tensor, kv_len: Tensor) -> Accepted:
        """Walks down `tree` along the target's own draws; the root stands at position `kv_len` [B]."""
        positions = kv_len[:, None] + tree.depths
        return accept(logits, tree.tokens, tree.parents, positions, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}


@dataclass(frozen=True, slots=True)
class Limits:
    """When an answer ends.

    Attributes:
        max_new_tokens: the most tokens it may have.
        eos_ids: a token of these ends it, and is kept.
        completes_stop: says whether the last token of prompt and answer completes a stop string, and is kept;
            None: there is none.
    """

    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()
    completes_stop: Callable[[Sequence[int]], bool] | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """The target's view of a tree: logits [B, N, V] and features [B, N, F], a row a node."""

    logits: Tensor
    features: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What a round emitted, before any cut; prefill makes the first, of one token.

    Attributes:
        tokens: [B, M] int64: accepted tokens, then the bonus token; M is the tree's depth plus one.
        features: [B, M, F]: the row whose draw is tokens[:, j], which is EAGLE's pair of feature and token.
        count: [B] int32 tokens emitted; what stands behind them is garbage.
    """

    tokens: Tensor
    features: Tensor
    count: Tensor

    @property
    def last(self) -> Tensor:
        """[B] the last token emitted: the next tree's root."""
        tokens = self.tokens
        return tokens[:, 0] if tokens.shape[1] == 1 else tokens.gather(1, self.count[:, None].long() - 1)[:, 0]

    def copied(self) -> "Step":
        """The same in tensors of its own."""
        return Step(self.tokens.clone(), self.features.clone(), self.count.clone())


@dataclass(frozen=True, slots=True)
class Emitted:
    """A round's tokens on the host, cut where the answer ends: one list a prompt.

    Attributes:
        tokens: the new tokens.
        from_draft: how many of them, from the front, the draft had proposed.
        accepted: how many proposed tokens the round accepted, before the cut.
    """

    tokens: list[list[int]]
    from_draft: list[int]
    accepted: list[int]


def capacity(positions: int) -> int:
    """Slots of a slab for `positions` tokens of prompt and answer: with room for a tree, rounded up.

    The same with and without a draft, since attention's split borders follow from it.
    """
    return -(-(positions + BUCKETS[-1]) // SLAB_STEP) * SLAB_STEP


class SlabPool:
    """KV slabs [L, 2, B, Hkv, S, D] that are kept when an answer is done: addresses stay, as graphs need.

    What lies idle has at most `IDLE_BYTES`, or is one slab. Threads may share a pool.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._layers, self._kv_heads, self._head_dim = layers, kv_heads, head_dim
        self._dtype, self._device = dtype, device
        self._idle: list[Tensor] = []  # the latest given back comes last
        self._lock = threading.RLock()  # an abandoned answer may be collected, and give back, at any line

    def borrow(self, batch: int, slots: int) -> Tensor:
        """A slab of `slots` slots, contents undefined.

        Raises:
            ValueError: it would not fit the device's free memory; the message has the estimate.
        """
        shape = (self._layers, 2, batch, self._kv_heads, slots, self._head_dim)
        with self._lock:
            found = next((slab for slab in reversed(self._idle) if slab.shape == shape), None)
            if found is not None:
                self._idle = [slab for slab in self._idle if slab is not found]
                return found
        return self.new(shape)

    def new(self, shape: tuple[int, ...]) -> Tensor:
        """A slab of any [L, 2, B, Hkv, S, D], contents undefined, which need not be given back: a draft's.

        Raises:
            ValueError: it would not fit the device's free memory, with nothing idle; the message has the estimate.
        """
        layers, _, batch, _, slots, _ = shape
        needed = torch.Size(shape).numel() * self._dtype.itemsize
        with self._lock:
            if needed > (free := free_bytes(self._device)):
                self._idle.clear()
                free = free_bytes(self._device)
        if needed > free:
            raise ValueError(
                f"KV cache: expected at most {free / 2**30:.2f} GiB, which is free on {self._device}, got "
                f"{needed / 2**30:.2f} GiB for {batch} x {slots} positions in {layers} layers"
            )
        with torch.inference_mode(False):  # so that it can be written to outside as well
            return torch.empty(shape, dtype=self._dtype, device=self._device)

    def give_back(self, slab: Tensor) -> None:
        """Keeps `slab` for the next answer of its shape; the slabs longest idle make room for it."""
        with self._lock:
            self._idle.append(slab)
            while len(self._idle) > 1 and sum(one.nbytes for one in self._idle) > IDLE_BYTES:
                del self._idle[0]


@dataclass(slots=True)
class DecodeState:
    """One answer under way. Borrow it from `Target.prefill`, and `close()` it.

    Attributes:
        slab: [L, 2, B, Hkv, S, D] keys and values.
        kv_len: [B] int32 tokens whose KV is stored, which is the root's position.
        sampling, limits: how tokens are drawn, when the answer ends.
        step: what the last round emitted.
        taps: which features the draft reads.
        prompt_ids: the prompt on the host, a list a row.
        tokens: the answer on the host, cut where it ends, a list a row.
        finished: the answer has ended.
        desk: where the steps of a round are run; on one that records, what stands here lies on it.
        drafting: what every forward of a draft runs in, its output head included, or the whole of a growth that may be
            replayed; a trace takes the time there.
    """

    slab: Tensor
    kv_len: Tensor
    sampling: Sampling
    limits: Limits
    step: Step
    taps: tuple[int, ...] | None
    prompt_ids: list[list[int]]
    pool: SlabPool
    desk: Desk = PLAIN_DESK
    tokens: list[list[int]] = field(init=False)
    finished: bool = field(init=False, default=False)
    drafting: Callable[[], AbstractContextManager[None]] = field(init=False, default=nullcontext)
    _closed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.tokens = [[] for _ in self.prompt_ids]

    @property
    def root(self) -> Tensor:
        """[B] the last emitted token, whose KV is not yet computed."""
        return self.step.last

    def root_tree(self) -> DraftTree:
        """The root alone, as `root_only` makes it."""
        step = self.step

        def root() -> tuple[Any, ...]:
            tree = root_only(step.last)
            return tree.tokens, tree.parents, tree.depths, tree.scores, tree.max_depth

        return DraftTree(*self.desk.run("root", root, (step.tokens, step.count), into="tree"))

    def laid(self, tree: DraftTree) -> DraftTree:
        """The tree where every step of a round reads it, whoever made it."""
        tokens, parents, depths, scores = self.desk.keep("tree", tree.tokens, tree.parents, tree.depths, tree.scores)
        return DraftTree(tokens, parents, depths, scores, tree.max_depth)

    def first(self) -> Emitted:
        """The token that prefill drew."""
        return self._emit(_told(self.step))

    def accept(self, tree: DraftTree, scores: Scores) -> Accepted:
        """Walks down the tree along the target's own draws."""
        tree = self.laid(tree)

        def walk() -> tuple[Any, ...]:
            found = self.sampling.accept(tree, scores.logits, self.kv_len)
            return found.path, found.length, found.next_token

        reads = tree.tokens, tree.parents, tree.depths, scores.logits, self.kv_len, *self.sampling.tensors
        return Accepted(*self.desk.run(("accept", *self.sampling.numbers), walk, reads, into="accepted"))

    def commit(self, tree: DraftTree, scores: Scores, accepted: Accepted) -> Emitted:
        """Ends a round: keeps the KV of the accepted path, advances, and brings the tokens to the host.

        Changes the slab, `kv_len`, `step`, `tokens` and, where the answer ends, `finished`.
        """
        tree = self.laid(tree)

        def advance() -> tuple[Any, ...]:
            if tree.max_depth:
                compact_kv(self.slab, self.kv_len, accepted.path, accepted.length)
                step = _step(tree, scores, accepted)
            else:  # the root alone, which stands where it belongs
                step = Step(accepted.next_token[:, None], scores.features[:, :1], accepted.length + 1)
            self.kv_len.add_(step.count)
            return step.tokens, step.features, step.count, _told(step)

        reads = tree.tokens, scores.features, accepted.path, accepted.length, accepted.next_token, self.kv_len
        *step, told = self.desk.run(("commit", tree.max_depth), advance, reads, into="step")
        self.step = Step(*step)
        return self._emit(told)

    def _emit(self, told: Tensor) -> Emitted:
        counts_and_tokens = told.tolist()  # the one host synchronisation of a round
        emitted = Emitted([], [], [])
        ended = []
        for answer, prompt, (count, *tokens) in zip(self.tokens, self.prompt_ids, counts_and_tokens, strict=True):
            kept, ends = self._cut(prompt, answer, tokens[:count])
            answer.extend(kept)
            ended.append(ends)
            emitted.tokens.append(kept)
            emitted.from_draft.append(min(len(kept), count - 1))
            emitted.accepted.append(count - 1)
        self.finished = all(ended)
        return emitted

    def _cut(self, prompt: list[int], answer: list[int], tokens: list[int]) -> tuple[list[int], bool]:
        """The tokens up to the one that ends the answer, and whether one does."""
        text = prompt + answer if self.limits.completes_stop else []
        for i, token in enumerate(tokens):
            text.append(token)
            if (
                token in self.limits.eos_ids
                or len(answer) + i + 1 >= self.limits.max_new_tokens
                or (self.limits.completes_stop is not None and self.limits.completes_stop(text))
            ):
                return tokens[: i + 1], True
        return tokens, False

    def close(self) -> None:
        """Gives the slab back; closing again does nothing."""
        if not self._closed:
            self._closed = True
            self.pool.give_back(self.slab)


def _wrapped(seed: int) -> int:
    """`seed` as a signed 64-bit integer."""
    return (seed + 2**63) % 2**64 - 2**63


def _step(tree: DraftTree, scores: Scores, accepted: Accepted) -> Step:
    path = accepted.path[:, : tree.max_depth].clamp(min=0).long()  # [B, depth]
    root = path.new_zeros(path.shape[0], 1)
    rows = torch.cat([root, path], dim=1)  # [B, M]: row j's draw is token j
    tokens = torch.cat([tree.tokens.gather(1, path), root], dim=1)
    tokens.scatter_(1, accepted.length[:, None].long(), accepted.next_token[:, None])
    features = scores.features.gather(1, rows[..., None].expand(-1, -1, scores.features.shape[-1]))
    return Step(tokens, features, accepted.length + 1)


def _told(step: Step) -> Tensor:
    """[B, 1 + M] int64 what a step tells the host: its count, then its tokens."""
    return torch.cat([step.count[:, None].long(), step.tokens], dim=1)
