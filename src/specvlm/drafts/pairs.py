"""What EAGLE's heads share: one decoder layer over pairs of a feature and the next token's embedding, growing a tree.

A pair joins the feature of position i with the embedding of token i + 1, at rotary position i. A head's lasting KV
holds pairs of the target's own features only: a round first appends what the target emitted, then grows a tree on top,
whose features are the head's outputs, and drops it. What of a prompt's pictures makes pairs, a compressor decides.

Source: EAGLE (Li et al., 2024).
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specvlm.checks import check_int
from specvlm.compressors import Compressor, CompressorConfig, compressor_config
from specvlm.drafts.growing import TreeGrower, draft_slab, rows_of
from specvlm.drafts.heads import Head, HeadConfig, HeadDraft
from specvlm.state import DecodeState, Step
from specvlm.targets.base import Prompt, Target
from specvlm.targets.hf_attention import AttentionStep
from specvlm.targets.llama_layers import Weight, hooks_why_not, layer_why_not, rotary_tables
from specvlm.tree import Beam, DraftTree, Plan, chain_ancestors


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConfig(HeadConfig):
    """Sizes of a head, besides those of every head.

    Attributes:
        draft_vocab_size: how many of the target's tokens the head can propose; None: all.
        compressor: what of a prompt's pictures it reads, or that config's settings by name; None: all there is.
    """

    draft_vocab_size: int | None = None
    compressor: CompressorConfig | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        HeadConfig.__post_init__(self)  # super() does not know a slotted dataclass
        if self.draft_vocab_size is not None:
            check_int("draft_vocab_size", self.draft_vocab_size, low=1, high=self.vocab_size)
        if self.compressor is not None:
            object.__setattr__(self, "compressor", compressor_config(self.compressor))

    def settings(self) -> dict[str, Any]:
        """The fields by name, as JSON holds them."""
        told, compressor = HeadConfig.settings(self), self.compressor
        return told | ({"compressor": compressor.settings()} if isinstance(compressor, CompressorConfig) else {})

    @property
    def proposable(self) -> int:
        """How many tokens the head can propose."""
        return self.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size


@dataclass(frozen=True, slots=True)
class Pairs:
    """What a head reads, a feature and the next token's embedding a row.

    Attributes:
        embeds, hidden: [B, P, H]; `hidden` are fused features of the target, or outputs of the head.
        positions: [B, P] int32 rotary positions: those of the features.
        direct: [B, P] bool rows whose embedding enters the layer as it is; None: there is none.
    """

    embeds: Tensor
    hidden: Tensor
    positions: Tensor
    direct: Tensor | None = None


class PairHead(Head):
    """A head's weights; its tensors have the names of EAGLE's published checkpoints.

    Args:
        config: its sizes.
    """

    config: PairConfig
    fc: nn.Linear

    def __init__(self, config: PairConfig) -> None:
        super().__init__(config)
        self.rotary = LlamaRotaryEmbedding(config.layer())
        compressor = config.compressor
        self.compressor = (
            compressor.build(config.hidden_size) if isinstance(compressor, CompressorConfig) else Compressor()
        )

    @property
    def layer(self) -> Any:
        """Its decoder layer."""
        raise NotImplementedError

    def fuse(self, features: Tensor) -> Tensor:
        """What pairs are made of, [B, T, H], from the target's features [B, T, F]: the features, unless it fuses."""
        return features

    def read(self, prompt: Prompt) -> tuple[Prompt, Pairs]:
        """What the head reads of a prompt: its rows, compressed, with features fused, and their pairs.

        Row j + 1's embedding goes with row j's feature; rows that do not follow each other in the prompt do here.
        """
        seen = self.compressor(replace(prompt, features=self.fuse(prompt.features)))
        return seen, Pairs(
            embeds=seen.embeds[:, 1:],
            hidden=seen.features[:, :-1],
            positions=seen.positions[:, 1:] - 1,
            direct=seen.image_mask[:, 1:] if self.compressor.direct else None,
        )

    def forward(self, pairs: Pairs, slab: Tensor | Cache | None, step: AttentionStep) -> Tensor:
        """The head's output [B, P, H], which is a pair's `hidden` one level on.

        Args:
            slab: a cache, to which the pairs' KV is added: [1, 2, B, Hkv, S, D], or one that grows, in training; None:
                nothing is kept.
            step: where the pairs go in it, and what they see.
        """
        raise NotImplementedError


#: Rows of an output head, and their bias [r], or None.
Output = tuple[Weight, Tensor | None]


class PairDecoder(Protocol):
    """A head's forward without gradients, by the kernels of the target's own decoder."""

    def __call__(self, pairs: Pairs, slab: Tensor, step: AttentionStep) -> Tensor:
        """See `PairHead.forward`."""
        ...

    def weights(self) -> tuple[Weight, ...]:
        """What its products read."""
        ...

    def quantized(self) -> Self:
        """The same forward, whose products read e4m3 with a scale a row."""
        ...


class PairDraft(HeadDraft):
    """A head on pairs as a draft.

    Args:
        head: the weights.
        policy: the trees' shape; None: EAGLE-2's, of 8 nodes and depth 5 on a CPU, 64 and 6 on a GPU.
        shared_noise: as in `HeadDraft`.
    """

    config_class: ClassVar[type[PairConfig]]
    head_class: ClassVar[type[PairHead]]

    head: PairHead
    #: Its forwards read weights of 8 bits.
    e4m3: bool = False

    #: Cosines and sines of every position of the target's context.
    _tables: tuple[Tensor, Tensor]
    #: What forwards and logits read instead of the head's weights.
    _small: PairDecoder | None = None
    _output: Output | None = None

    def quantized(self) -> Self:
        """A draft of the same head, shared, which reads its weights and the output head's as e4m3 with a scale a row.

        That halves the bytes of a level, on a GPU; a CPU has no such products and takes longer. The draft may guess a
        little worse; verification, and so the answer, stays as it is. What is read are copies, which lie beside the
        weights, of what these are when a target is bound: after more training, ask for it again.
        """
        made = copy.copy(self)
        made.e4m3, made._fitted = True, None
        return made

    @property
    def sizes(self) -> dict[str, Any]:
        return super().sizes | ({"e4m3": True} if self.e4m3 else {})

    def fit(self, target: Target) -> None:
        self._tables = rotary_tables(self.head.rotary, target.spec.context, self.head.config.head_dim)
        if self.e4m3:
            self._check_small()
        self._small = self.fused().quantized() if self.e4m3 else None
        self._output = self.output_rows(target)
        if self._output is not None and self.e4m3:
            rows, bias = self._output
            self._output = rows.quantized(), bias

    def output_rows(self, target: Target) -> Output | None:
        """Rows [r, H] of the output head for what it can propose, where the draft holds them itself; None: it does
        not."""
        raise NotImplementedError

    def decoder(self) -> Callable[[Pairs, Tensor, AttentionStep], Tensor]:
        """The head's forward without gradients, with its weights as they lie now; its modules', where they are more
        than weights.

        Raises:
            ValueError: they are, and the draft reads copies of 8 bits.
        """
        if self._small is None:
            return self.head if self.why_not() else self.fused()
        self._check_small()
        return self._small

    def _check_small(self) -> None:
        """Raises a ValueError unless copies of the weights are all that the head's forward is."""
        if reason := self.why_not():
            raise ValueError(f"{self.kind} e4m3: {reason}")

    def why_not(self) -> str | None:
        """What keeps the kernels from the head's forward, as "name: expected X, got Y"; None: nothing."""
        fc = type(self.head.fc)
        if fc is not nn.Linear:
            return f"fc: expected Linear, got {fc.__name__}"
        return layer_why_not(self.head.layer) or hooks_why_not(self.head, "the head")

    @property
    def recording(self) -> Hashable:
        """As `HeadDraft.recording`; None: modules that are more than weights may look at the host."""
        return None if self.why_not() else super().recording

    def fused(self) -> PairDecoder:
        """The forward over the head's own weights, which become views of fused ones."""
        raise NotImplementedError

    def start(self, prompt: Prompt, state: DecodeState) -> "PairSession":
        """A session that has read the prompt."""
        return PairSession(copy.copy(self), prompt, state)  # it keeps this target, whatever else is bound meanwhile

    def held(self) -> Iterator[Tensor]:
        yield from super().held()
        yield from self._tables
        output, bias = self._output or (None, None)
        weights = () if self._small is None else self._small.weights()
        for weight in (*weights, *(() if output is None else (output,))):
            yield from (tensor for tensor in (weight.values, weight.scale) if tensor is not None)
        if bias is not None:
            yield bias
        if self.vocabulary is not None:
            yield self.vocabulary

    @property
    def vocabulary(self) -> Tensor | None:
        """[r] int64 ascending, the target's tokens that it can propose; None: all."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., r] of outputs [..., H], over what it can propose."""
        raise NotImplementedError


class PairSession:
    """A head at work on one answer: its KV of true pairs, on which each round's tree grows and falls."""

    def __init__(self, draft: PairDraft, prompt: Prompt, state: DecodeState) -> None:
        self._draft, self._target = draft, draft.target
        self._decoder = draft.decoder()
        config = draft.head.config
        self._trees = TreeGrower(draft.policy, draft.exclude, draft.shared_noise, draft.vocabulary)
        self._context = draft.target.spec.context
        self._slab = draft_slab(state, 1, config.num_key_value_heads, config.head_dim)
        seen, pairs = draft.head.read(prompt)
        (self._left_out,) = state.desk.keep("rows left out", prompt.lengths - seen.lengths)
        self._guide = None if seen.guide is None else state.desk.keep("guide", seen.guide)[0]
        self.reads: tuple[Tensor, ...] = (self._left_out,) if self._guide is None else (self._left_out, self._guide)
        self.recording: Hashable = draft.recording
        if pairs.positions.shape[1]:
            self._decoder(pairs, self._slab, AttentionStep(torch.zeros_like(self._left_out), None))

    def propose(self, state: DecodeState) -> DraftTree:
        """A tree by the draft's policy, on top of what was emitted."""
        return self._trees.grow(self, state)

    def append(self, step: Step, first: Tensor) -> Tensor:
        """Adds the true pairs of emitted tokens to the lasting KV; the output [B, 1, H] at the last of them."""
        before = first - 1  # a pair stands at its feature's position
        count = step.tokens.shape[1]
        chain = chain_ancestors(count, before.device).expand(before.shape[0], -1, -1)
        positions = before[:, None] + torch.arange(count, dtype=torch.int32, device=before.device)
        features = self._draft.head.fuse(step.features)
        hidden = self._forward(step.tokens, features, positions, AttentionStep(before - self._left_out, chain))
        return rows_of(hidden, step.count[:, None].long() - 1)

    def expand(self, beam: Beam, above: Tensor, depth: int, plan: Plan, state: DecodeState) -> Tensor:
        """Outputs [B, k, H] for the beam's nodes, whose parents at `depth` gave `above`."""
        positions = (state.kv_len + depth)[:, None].expand(beam.tokens.shape)
        behind_root = state.kv_len - self._left_out
        step = AttentionStep(behind_root, beam.ancestors, first_slot=behind_root + depth * plan.width)
        return self._forward(beam.tokens, above, positions, step)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, R, r] over what the draft can propose."""
        return self._draft.logits(hidden)

    def _forward(self, tokens: Tensor, hidden: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        hidden = self._draft.head.compressor.guided(hidden, self._guide)
        pairs = Pairs(self._target.embed(tokens), hidden, positions.clamp(max=self._context - 1))
        return self._decoder(pairs, self._slab, step)
