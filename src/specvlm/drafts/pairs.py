"""What EAGLE's heads share: one decoder layer over pairs of a feature and the next token's embedding, growing a tree.

A pair joins the feature of position i with the embedding of token i + 1, at rotary position i. A head's lasting KV
holds pairs of the target's own features only: a round first appends what the target emitted, then grows a tree on top,
whose features are the head's outputs, and drops it. What of a prompt's pictures makes pairs, a compressor decides.

Source: EAGLE (Li et al., 2024).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specvlm.checks import check_int, check_number
from specvlm.compressors import Compressor, CompressorConfig, compressor_config
from specvlm.drafts.folder import load_strictly, read_folder, write_folder
from specvlm.drafts.growing import TreeGrower, draft_slab, rows_of
from specvlm.policies import Eagle2, TreePolicy
from specvlm.state import DecodeState, Step
from specvlm.targets.base import Prompt, Target, TargetSpec
from specvlm.targets.hf_attention import ATTENTION, AttentionStep
from specvlm.tree import Beam, DraftTree, Plan, chain_ancestors
from specvlm_kernels.tree_attention import HEAD_DIMS


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """Sizes of a head; hidden_size and vocab_size are the target's.

    Attributes:
        draft_vocab_size: how many of the target's tokens the head can propose; None: all.
        compressor: what of a prompt's pictures it reads, or that config's settings by name; None: all there is.

    Raises:
        ValueError, TypeError: a size that is out of its range or no number, by name.
    """

    hidden_size: int
    vocab_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    draft_vocab_size: int | None = None
    compressor: CompressorConfig | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "intermediate_size", "max_position_embeddings"):
            check_int(name, getattr(self, name), low=1)
        check_int("num_attention_heads", self.num_attention_heads, low=1)
        check_int("num_key_value_heads", self.num_key_value_heads, low=1, high=self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of {self.num_attention_heads}, got {self.num_key_value_heads}"
            )
        check_int("head_dim", self.head_dim, low=HEAD_DIMS[0], high=HEAD_DIMS[1])
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        for name in ("rope_theta", "rms_norm_eps"):
            check_number(name, getattr(self, name))
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: expected a finite number > 0, got {getattr(self, name)}")
        if self.draft_vocab_size is not None:
            check_int("draft_vocab_size", self.draft_vocab_size, low=1, high=self.vocab_size)
        if self.compressor is not None:
            object.__setattr__(self, "compressor", compressor_config(self.compressor))

    def settings(self) -> dict[str, Any]:
        """The fields by name, as JSON holds them."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        compressor = self.compressor
        return told | ({"compressor": compressor.settings()} if isinstance(compressor, CompressorConfig) else {})

    @property
    def proposable(self) -> int:
        """How many tokens the head can propose."""
        return self.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size

    def layer(self) -> LlamaConfig:
        """The decoder layer's settings, for transformers' modules."""
        made = LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.rms_norm_eps,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
        )
        made._attn_implementation = ATTENTION
        return made


def sizes_like(spec: TargetSpec) -> dict[str, Any]:
    """The sizes that a head takes over from its target: widths, attention heads, context."""
    return {
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.context,
    }


@dataclass(frozen=True, slots=True)
class Pairs:
    """What a head reads, a feature and the next token's embedding a row.

    Attributes:
        embeds, hidden: [B, P, H]; `hidden` are fused features of the target, or outputs of the head.
        positions: [B, P] rotary positions: those of the features.
        direct: [B, P] bool rows whose embedding enters the layer as it is; None: there is none.
    """

    embeds: Tensor
    hidden: Tensor
    positions: Tensor
    direct: Tensor | None = None


class PairHead(nn.Module):
    """A head's weights; its tensors have the names of EAGLE's published checkpoints.

    Args:
        config: its sizes.
    """

    config: HeadConfig

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = LlamaRotaryEmbedding(config.layer())
        compressor = config.compressor
        self.compressor = (
            compressor.build(config.hidden_size) if isinstance(compressor, CompressorConfig) else Compressor()
        )

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
            slab: [1, 2, B, Hkv, S, D], to which the pairs' KV is written; in training a cache that grows, or None:
                nothing is kept.
            step: where the pairs go in it, and what they see.
        """
        raise NotImplementedError


class PairDraft:
    """A head as a draft.

    Args:
        head: the weights.
        policy: the trees' shape; None: EAGLE-2's, of 8 nodes and depth 5 on a CPU, 64 and 6 on a GPU.
        shared_noise: choose candidates under the target's own sampling noise; False is the usual tree, whose
            candidates are the likeliest tokens whatever the target is about to draw.
    """

    #: Its name on disk and in messages, and what it is read into.
    kind: ClassVar[str]
    config_class: ClassVar[type[HeadConfig]]
    head_class: ClassVar[type[PairHead]]

    head: PairHead
    #: What `bind` bound it to, and the ids that it never proposes there.
    target: Target
    exclude: Tensor

    def __init__(self, head: PairHead, policy: TreePolicy | None = None, shared_noise: bool = True) -> None:
        self.head = head.eval()
        self.policy = policy or Eagle2()
        self.shared_noise = shared_noise
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._fitted: Any = None

    @property
    def taps(self) -> tuple[int, ...] | None:
        """The target's post-final-norm states, unless a head reads others."""
        return None

    @classmethod
    def from_pretrained(cls, folder: str | Path, policy: TreePolicy | None = None, shared_noise: bool = True) -> Self:
        """Reads a head that `save_pretrained` wrote.

        Raises:
            ValueError: the config or a tensor is missing, unexpected or misshapen; all are named.
        """
        config, tensors = read_folder(Path(folder), draft_type=cls.kind, config_class=cls.config_class)
        head = cls.head_class(config)
        load_strictly(head, tensors, str(folder))
        return cls(head, policy, shared_noise)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, whole or not at all."""
        write_folder(
            Path(folder), draft_type=self.kind, config=self.head.config.settings(), tensors=self.head.state_dict()
        )

    def bind(self, target: Target) -> None:
        """Fits the head to the target, on its device and in its dtype; it serves one target at a time.

        Its heads, its width inside and its KV are its own, and need not be the target's.

        Raises:
            ValueError: naming what does not fit (a size, ids that the head may propose), or a target of another device
                or dtype than the one it was bound to before.
        """
        spec = target.spec
        self._check_sizes(spec)
        place = spec.device, spec.dtype
        if self._place not in (None, place):
            raise ValueError(f"{self.kind}: expected a target on {self._place}, where the head is, got one on {place}")
        if target.model is not self._fitted:  # every answer binds, and most to the model before
            self.check_fit(spec)
            self._place = place
            self.head.to(spec.device)
            for part in self.head.children():
                if part is not self.head.rotary:  # its frequencies stay in fp32
                    part.to(spec.dtype)
            self.exclude = torch.tensor(sorted(spec.media_ids), dtype=torch.int64, device=spec.device)
            self.fit(target)
            self._fitted = target.model
        self.target = target

    def check_fit(self, spec: TargetSpec) -> None:
        """Raises a ValueError that names what besides its sizes keeps the head from serving a target of `spec`."""

    def fit(self, target: Target) -> None:
        """Makes what the head needs of a target that it has not served before."""

    def _check_sizes(self, spec: TargetSpec) -> None:
        config = self.head.config
        for name, wanted in (("hidden_size", spec.hidden_size), ("vocab_size", spec.vocab_size)):
            if getattr(config, name) != wanted:
                raise ValueError(f"{self.kind} {name}: expected the target's {wanted}, got {getattr(config, name)}")
        width = self.policy.widest(spec.device)
        if width > config.proposable:
            raise ValueError(
                f"width: expected at most the {config.proposable} tokens that the head can propose, got {width}"
            )

    @property
    def sizes(self) -> dict[str, Any]:
        """What its speed hangs on."""
        return self.head.config.settings()

    def start(self, prompt: Prompt, state: DecodeState) -> "PairSession":
        """A session that has read the prompt."""
        return PairSession(self, prompt, state)

    @property
    def vocabulary(self) -> Tensor | None:
        """[r] int64 ascending, the target's tokens that it can propose; None: all."""
        raise NotImplementedError

    def own_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., r] of outputs [..., H], over what it can propose."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of outputs [..., H], over the target's vocabulary; -inf for what it cannot propose."""
        logits, ids = self.own_logits(hidden), self.vocabulary
        return logits if ids is None else spread(logits, ids, self.head.config.vocab_size)


class PairSession:
    """A head at work on one answer: its KV of true pairs, on which each round's tree grows and falls."""

    def __init__(self, draft: PairDraft, prompt: Prompt, state: DecodeState) -> None:
        self._draft, self._target = draft, draft.target
        config = draft.head.config
        self._trees = TreeGrower(draft.policy, draft.exclude, draft.shared_noise)
        self._context = draft.target.spec.context
        self._slab = draft_slab(state, 1, config.num_key_value_heads, config.head_dim)
        seen, pairs = draft.head.read(prompt)
        self._guide, self._left_out = seen.guide, prompt.lengths - seen.lengths
        if pairs.positions.shape[1]:
            draft.head(pairs, self._slab, AttentionStep(torch.zeros_like(self._left_out), None))

    def propose(self, state: DecodeState) -> DraftTree:
        """A tree by the draft's policy, on top of what was emitted."""
        return self._trees.grow(self, state)

    def append(self, step: Step, first: Tensor) -> Tensor:
        """Adds the true pairs of emitted tokens to the lasting KV; the output [B, 1, H] at the last of them."""
        before = first - 1  # a pair stands at its feature's position
        count = step.tokens.shape[1]
        chain = chain_ancestors(count, before.device).expand(before.shape[0], -1, -1)
        positions = before[:, None] + torch.arange(count, device=before.device)
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
        """Logits [B, R, V] over the target's vocabulary."""
        return self._draft.logits(hidden)

    def _forward(self, tokens: Tensor, hidden: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        hidden = self._draft.head.compressor.guided(hidden, self._guide)
        pairs = Pairs(self._target.embed(tokens), hidden, positions.clamp(max=self._context - 1))
        return self._draft.head(pairs, self._slab, step)


def spread(logits: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """Logits [..., r] of `ids` [r] over the whole vocabulary [..., V]; -inf for all others."""
    return logits.new_full((*logits.shape[:-1], vocab_size), -torch.inf).index_copy_(-1, ids, logits)
