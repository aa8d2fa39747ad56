"""A block draft: a few layers that propose a whole block of tokens in one forward.

With `taps` the target's features at a position, r the root, at position p, B the block's size and m a learned vector:

    context = hidden_norm(fc(taps))                            at positions 0 to p - 1
    x = [embedding of r, m, ..., m]                            at positions p to p + B - 1
    in every layer:
        h  = input_layernorm(x)
        x += attention(queries h, keys and values of [context ; h])
        x += mlp(post_attention_layernorm(x))
    logits of the token at position p + k = the target's head on norm(x)[k],    k = 1 to B - 1

Queries and keys are normalised a head, then rotated; a row sees the context and the whole block. Layers do not refine
the context, so its keys and values are written once, as tokens are emitted; the block's own stand behind them for one
forward. A slot does not know what another one says: its candidates are the same below every node of its depth, and the
tree is made of the likeliest paths.

Source: DFlash (Chen et al., 2026). Unlike there, the mask is a vector of the draft's own and no token of the target's.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    rotate_half,
)

from specvlm.checks import check_int
from specvlm.drafts.growing import TreeGrower, draft_slab
from specvlm.drafts.heads import Head, HeadConfig, HeadDraft, checked_taps, sizes_like
from specvlm.policies import History, TreePolicy, default_plan
from specvlm.state import DecodeState
from specvlm.targets.base import Prompt, TargetSpec
from specvlm.targets.hf_attention import AttentionStep, slab_cache
from specvlm.tree import DraftTree, FreePlan, Growth, Plan
from specvlm_kernels import write_kv
from specvlm_kernels.drafting import MOST_CHILDREN


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig(HeadConfig):
    """Sizes of a block draft, besides those of every head.

    Attributes:
        block_size: rows of a block, the root's among them, from 2 to 64.
        num_hidden_layers: from 1 to 32.
        taps: the target's layers whose inputs are fused, low to high.
    """

    family: ClassVar[type[Qwen3Config]] = Qwen3Config

    block_size: int
    num_hidden_layers: int
    taps: tuple[int, ...]

    def __post_init__(self) -> None:
        HeadConfig.__post_init__(self)  # super() does not know a slotted dataclass
        check_int("block_size", self.block_size, low=2, high=64)
        check_int("num_hidden_layers", self.num_hidden_layers, low=1, high=32)
        object.__setattr__(self, "taps", checked_taps(self.taps))

    @classmethod
    def for_target(
        cls,
        spec: TargetSpec,
        intermediate_size: int,
        *,
        block_size: int = 16,
        num_hidden_layers: int = 5,
        taps: Sequence[int] | None = None,
    ) -> "BlockConfig":
        """A block draft with the target's own attention heads.

        Args:
            taps: None: the outputs of five of its layers, evenly from the second to the third from the end, each once.
        """
        last = spec.num_layers - 1  # no output of the last layer: that is no layer's input
        outputs = (1 + i * (spec.num_layers - 4) / 4 for i in range(5))
        spread = sorted({min(max(round(output), 0) + 1, last) for output in outputs})
        return cls(
            **sizes_like(spec),
            intermediate_size=intermediate_size,
            block_size=block_size,
            num_hidden_layers=num_hidden_layers,
            taps=tuple(spread if taps is None else taps),
        )


class BlockHead(Head):
    """The weights, under the names of DFlash's published checkpoints, and the mask's vector.

    Args:
        config: its sizes.
    """

    config: BlockConfig

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        layer = config.layer()
        self.rotary = Qwen3RotaryEmbedding(layer)
        self.fc = nn.Linear(len(config.taps) * width, width, bias=False)
        self.hidden_norm = Qwen3RMSNorm(width, eps=eps)
        self.layers = nn.ModuleList(Qwen3DecoderLayer(layer, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(width, eps=eps)
        self.mask_embedding = nn.Parameter(0.02 * torch.randn(width))

    def context(self, features: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every layer's keys and values [B, Hkv, T, D] of the target's features [B, T, F] at `positions` [B, T]."""
        hidden = self.hidden_norm(self.fc(features))
        heads = (*hidden.shape[:-1], -1, self.config.head_dim)
        cos, sin = (each.unsqueeze(1) for each in self.rotary(hidden, positions))

        def of(attention: Any) -> tuple[Tensor, Tensor]:
            keys = attention.k_norm(attention.k_proj(hidden).view(heads)).transpose(1, 2)
            return keys * cos + rotate_half(keys) * sin, attention.v_proj(hidden).view(heads).transpose(1, 2)

        return [of(layer.self_attn) for layer in self.layers]

    def forward(self, roots: Tensor, positions: Tensor, cache: Cache, step: AttentionStep) -> Tensor:
        """Outputs [B, A * block_size, H] of A blocks, of which `logits` makes logits.

        Args:
            roots: [B, A, H] embeddings of the tokens that they begin with.
            positions: [B, A * block_size] of all their rows.
            cache: gives the context's keys and values with the blocks' own.
            step: what of them the rows see.
        """
        masks = self.mask_embedding.expand(*roots.shape[:2], self.config.block_size - 1, -1)
        hidden = torch.cat([roots[:, :, None], masks], dim=2).flatten(1, 2)
        rotary = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotary, past_key_values=cache, step=step)
        return self.norm(hidden)


@dataclass(frozen=True, slots=True)
class BestFirst(TreePolicy):
    """The likeliest paths through a block, of whatever shape: what a heap, best first, would take.

    No level and no family of the tree holds more than `nodes` - 1 nodes, so growing that many leaves out none of the
    best. It is for block drafts alone: those expand a node without a forward.

    Attributes:
        nodes: the most nodes, root included, from 2 to 65; None: 8 on a CPU, 64 on a GPU.
    """

    nodes: int | None = None

    looks_back = False
    free = True

    def __post_init__(self) -> None:
        if self.nodes is not None:
            check_int("nodes", self.nodes, low=2, high=MOST_CHILDREN + 1)

    def plan(self, history: History) -> Plan:
        drafted = self.widest(history.device)
        return FreePlan(nodes=drafted + 1, depth=drafted, width=drafted)

    def widest(self, device: torch.device) -> int:
        return (self.nodes or default_plan(device).nodes) - 1


class BlockDraft(HeadDraft):
    """A block draft; it takes any policy, whose trees end where the block does.

    Args:
        head: the weights.
        policy: the trees' shape; None: the likeliest paths, 8 nodes on a CPU and 64 on a GPU.
        shared_noise: as in `HeadDraft`.

    Example:
        >>> draft = BlockDraft.from_pretrained("folder")
        >>> model = specvlm.SpecVLM(hf_model, draft=draft)
    """

    kind = "block"
    config_class = BlockConfig
    head_class = BlockHead
    usual_policy = BestFirst
    stores_trees = False

    head: BlockHead

    @property
    def taps(self) -> tuple[int, ...]:
        """The inputs of these layers of the target."""
        return self.head.config.taps

    def start(self, prompt: Prompt, state: DecodeState) -> "BlockSession":
        """A session that has read the prompt.

        Raises:
            ValueError: the draft's KV does not fit the device's free memory.
        """
        return BlockSession(copy.copy(self), prompt, state)  # it keeps this target

    def context(self, features: Tensor, first: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every layer's keys and values [B, Hkv, T, D] of features [B, T, F] at positions from `first` [B] on."""
        return self.head.context(features, self._positions(first[:, None], features.shape[1]))

    def forward(self, roots: Tensor, first: Tensor, cache: Cache, step: AttentionStep) -> Tensor:
        """Outputs [B, A * block_size, H] of A blocks from positions `first` [B, A] on; see `BlockHead.forward`."""
        return self.head(roots, self._positions(first, self.head.config.block_size), cache, step)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of outputs [..., H], by the target's head."""
        return self.target.head(hidden)

    def _positions(self, first: Tensor, count: int) -> Tensor:
        """[B, A * count] from each of `first` [B, A] on; those past the target's context are taken for its last."""
        rows = first[..., None] + torch.arange(count, device=first.device)
        return rows.flatten(1).clamp(max=self.target.spec.context - 1)


class BlockSession:
    """A block draft at work on one answer: the KV of what the target has read, behind which a round lays its block."""

    def __init__(self, draft: BlockDraft, prompt: Prompt, state: DecodeState) -> None:
        config = draft.head.config
        self._draft, self._block_size = draft, config.block_size
        self._trees = TreeGrower(draft.policy, draft.exclude, draft.shared_noise)
        self._slab = draft_slab(state, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        self._read(prompt.features, torch.zeros_like(state.kv_len))

    def propose(self, state: DecodeState) -> DraftTree:
        """A tree by the draft's policy, from one forward."""
        plan = self._trees.plan(state)
        if plan is None:
            return state.root_tree()
        plan = replace(plan, depth=min(plan.depth, self._block_size - 1))
        with state.drafting():
            for step, first in self._trees.unread(state):
                self._read(step.features, first - 1)  # a token's feature stands before it
            logits = self._draft.logits(self._outputs(state)[:, 1 : plan.depth + 1])
        above = state.kv_len[:, None] + torch.arange(plan.depth, device=logits.device)  # where a slot's parents stand
        tokens, scores = self._trees.children(logits, above, plan, state)
        growth = Growth(state.root, plan)
        for depth in range(plan.depth):
            if depth:
                growth.beam()
            below = [each[:, depth, None].expand(-1, growth.parent_scores.shape[1], -1) for each in (tokens, scores)]
            self._trees.extend(growth, below[0], below[1], depth, plan)
        return self._trees.select(growth, plan)

    def _read(self, features: Tensor, first: Tensor) -> None:
        """Writes the keys and values of the target's features [B, T, F] to the slots from `first` [B] on."""
        for (k_cache, v_cache), (keys, values) in zip(self._slab, self._draft.context(features, first), strict=True):
            write_kv(k_cache, v_cache, keys, values, first)

    def _outputs(self, state: DecodeState) -> Tensor:
        """Outputs [B, block_size, H] of the block that the root begins."""
        size = self._block_size
        all_slots = (1 << size) - 1 if size < 64 else -1  # bit 63 is the sign
        seen = state.root.new_full((len(state.root), size, 1), all_slots)
        step = AttentionStep(state.kv_len, seen)
        roots = self._draft.target.embed(state.root)[:, None]
        return self._draft.forward(roots, state.kv_len[:, None], slab_cache(self._slab, step), step)
