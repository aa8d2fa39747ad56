"""EAGLE's draft head: one decoder layer that continues the target's features, growing an EAGLE-2 tree.

The head reads pairs of the target's feature at position i and the embedding of token i + 1, at rotary position i:
`fc([embedding, feature])`, one Llama layer, the target's own output head. Its lasting KV holds pairs of true features
only: a round first appends what the target emitted, then grows a tree on top and drops it.

Sources: EAGLE-2 (Li et al., 2024); the optional input layer norm is SpecVLM's.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from specvlm.checks import check_int, check_number
from specvlm.drafts.folder import load_strictly, read_folder, write_folder
from specvlm.state import DecodeState
from specvlm.targets.base import Prompt, Target, TargetSpec
from specvlm.targets.hf_attention import ATTENTION, HEAD_DIMS, AttentionStep, slab_cache
from specvlm.tree import Beam, DraftTree, Growth, Plan, rerank
from specvlm_kernels import draft_topk, pack_ancestors

#: A tree that is worth its nodes: where a round's time follows the node count, and where nodes are nearly free.
CPU_PLAN = Plan(nodes=16, depth=5, width=4)
GPU_PLAN = Plan(nodes=64, depth=6, width=10)


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """Sizes of a head; hidden_size and vocab_size are the target's.

    Attributes:
        bias: the fc has one.
        input_layernorm: normalise what enters the layer's attention, as SpecVLM does; EAGLE does not.
        draft_vocab_size: how many of the target's tokens the head can propose; None: all.
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
    bias: bool = True
    input_layernorm: bool = False
    draft_vocab_size: int | None = None

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
        for name in ("rope_theta", "rms_norm_eps"):
            check_number(name, getattr(self, name))
        if self.draft_vocab_size is not None:
            check_int("draft_vocab_size", self.draft_vocab_size, low=1, high=self.vocab_size)

    @classmethod
    def for_target(cls, spec: TargetSpec, intermediate_size: int, input_layernorm: bool = False) -> "EagleConfig":
        """A head with the target's own heads."""
        return cls(
            hidden_size=spec.hidden_size,
            vocab_size=spec.vocab_size,
            intermediate_size=intermediate_size,
            num_attention_heads=spec.num_heads,
            num_key_value_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            max_position_embeddings=spec.context,
            input_layernorm=input_layernorm,
        )


class EagleHead(nn.Module):
    """The head's weights, under the names of EAGLE's published checkpoints.

    Args:
        config: its sizes.
    """

    #: [r] int64 the ids that a reduced head can propose.
    vocabulary: Tensor

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        layer_config = LlamaConfig(
            hidden_size=width,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
        layer_config._attn_implementation = ATTENTION
        self.fc = nn.Linear(2 * width, width, bias=config.bias)
        self.layers = nn.ModuleList([LlamaDecoderLayer(layer_config, layer_idx=0)])
        if not config.input_layernorm:
            self.layers[0].input_layernorm = nn.Identity()
        self.rotary = LlamaRotaryEmbedding(layer_config)
        if config.draft_vocab_size is not None:
            self.register_buffer("vocabulary", torch.arange(config.draft_vocab_size))

    def forward(
        self, embeds: Tensor, features: Tensor, positions: Tensor, slab: Tensor | None, step: AttentionStep
    ) -> Tensor:
        """The head's output [B, T, H] for pairs of embeddings and features [B, T, H].

        Args:
            positions: [B, T] rotary positions: those of the features.
            slab: [1, 2, B, Hkv, S, D], to which the pairs' KV is written; None: nothing is kept, as in training.
            step: where the pairs go in it, and what they see.
        """
        hidden = self.fc(torch.cat([embeds, features], dim=-1))
        return self.layers[0](
            hidden,
            position_embeddings=self.rotary(hidden, positions),
            past_key_values=None if slab is None else slab_cache(slab, step),
            use_cache=slab is not None,
            step=step,
        )


class EagleDraft:
    """An EAGLE head as a draft.

    Args:
        head: the weights.
        plan: the tree's shape; None: 16 nodes of depth 5 on a CPU, 64 of depth 6 on a GPU.
        shared_noise: choose candidates under the target's own sampling noise; False is the usual tree, whose
            candidates are the likeliest tokens whatever the target is about to draw.

    Example:
        >>> draft = EagleDraft.from_pretrained("folder")
        >>> model = specvlm.SpecVLM(hf_model, draft=draft)
    """

    taps: tuple[int, ...] | None = None

    #: What `bind` bound it to, and the ids that it never proposes there.
    target: Target
    exclude: Tensor

    def __init__(self, head: EagleHead, plan: Plan | None = None, shared_noise: bool = True) -> None:
        self.head = head.eval()
        self.plan = plan
        self.shared_noise = shared_noise
        self._reduced: Tensor | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path, plan: Plan | None = None, shared_noise: bool = True) -> "EagleDraft":
        """Reads a head that `save_pretrained` wrote.

        Raises:
            ValueError: the config or a tensor is missing, unexpected or misshapen; all are named.
        """
        config, tensors = read_folder(Path(folder), draft_type="eagle", config_class=EagleConfig)
        head = EagleHead(config)
        load_strictly(head, tensors, str(folder))
        return cls(head, plan, shared_noise)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, whole or not at all."""
        write_folder(Path(folder), draft_type="eagle", config=asdict(self.head.config), tensors=self.head.state_dict())

    def bind(self, target: Target) -> None:
        """Fits the head to the target, on its device and in its dtype.

        Raises:
            ValueError: naming the size that does not fit, or an image id among what the head may propose.
        """
        config, spec = self.head.config, target.spec
        for name, wanted in (("hidden_size", spec.hidden_size), ("vocab_size", spec.vocab_size)):
            if getattr(config, name) != wanted:
                raise ValueError(f"eagle {name}: expected the target's {wanted}, got {getattr(config, name)}")
        self.head.to(device=spec.device, dtype=spec.dtype)
        if config.draft_vocab_size is not None:
            _check_vocabulary(self.head.vocabulary, spec)
            self._reduced = target.head_rows(self.head.vocabulary)
        self.target = target
        self.exclude = torch.tensor(sorted(spec.media_ids), dtype=torch.int64, device=spec.device)

    def plan_on(self, device: torch.device) -> Plan:
        """The tree's shape on `device`: the one that was set, or the device's own."""
        return self.plan or (GPU_PLAN if device.type == "cuda" else CPU_PLAN)

    def start(self, prompt: Prompt, state: DecodeState) -> "EagleSession":
        """A session that has read the prompt."""
        return EagleSession(self, prompt, state)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] over the target's vocabulary; -inf for what a reduced head cannot propose."""
        if self._reduced is None:
            return self.target.head(hidden)
        full = hidden.new_full((*hidden.shape[:-1], self.head.config.vocab_size), -torch.inf)
        return full.index_copy_(-1, self.head.vocabulary, hidden @ self._reduced.T)


class EagleSession:
    """A head at work on one answer: its KV of true pairs, on which each round's tree grows and falls."""

    def __init__(self, draft: EagleDraft, prompt: Prompt, state: DecodeState) -> None:
        self._draft, self._target = draft, draft.target
        config, slots = draft.head.config, state.slab.shape[-2]
        batch, length = prompt.input_ids.shape
        device = prompt.input_ids.device
        self._plan = draft.plan_on(device)
        self._context = config.max_position_embeddings
        self._slab = torch.empty(
            (1, 2, batch, config.num_key_value_heads, slots, config.head_dim),
            dtype=prompt.features.dtype,
            device=device,
        )
        if length > 1:
            empty = torch.zeros(batch, dtype=torch.int32, device=device)
            pairs = prompt.embeds[:, 1:], prompt.features[:, :-1], prompt.positions[:, :-1]
            draft.head(*pairs, self._slab, AttentionStep(empty, None))

    def propose(self, state: DecodeState) -> DraftTree:
        """A tree of the session's plan, on top of what the last round emitted."""
        plan, growth = self._plan, Growth(state.root, self._plan)
        hidden = self._append(state)
        for depth in range(plan.depth):
            growth.expand(*self._children(hidden, depth, state))
            if depth + 1 < plan.depth:
                hidden = self._expand(growth.beam(), hidden, depth, state)
        return rerank(growth.candidates(), plan)

    def _append(self, state: DecodeState) -> Tensor:
        """Adds the last round's true pairs to the lasting KV; the output [B, 1, H] at the root."""
        step = state.step
        before = state.kv_len - step.count
        chain = _chain(step.tokens.shape[1], step.tokens.device)
        positions = self._positions(before[:, None] + torch.arange(step.tokens.shape[1], device=before.device))
        hidden = self._draft.head(
            self._target.embed(step.tokens),
            step.features,
            positions,
            self._slab,
            AttentionStep(before, chain.expand(before.shape[0], -1, -1)),
        )
        return _rows(hidden, step.count[:, None].long() - 1)

    def _expand(self, beam: Beam, hidden: Tensor, depth: int, state: DecodeState) -> Tensor:
        """Outputs [B, k, H] for the beam's nodes, whose parents at `depth` gave `hidden`."""
        tokens = beam.tokens
        positions = self._positions((state.kv_len + depth)[:, None].expand(tokens.shape))
        step = AttentionStep(state.kv_len, beam.ancestors, first_slot=state.kv_len + depth * self._plan.width)
        return self._draft.head(
            self._target.embed(tokens), _rows(hidden, beam.parent_rows), positions, self._slab, step
        )

    def _children(self, hidden: Tensor, depth: int, state: DecodeState) -> tuple[Tensor, Tensor]:
        """The best tokens [B, R, k] below nodes at `depth`, and their log-probabilities."""
        positions = (state.kv_len + depth)[:, None].expand(hidden.shape[:2])
        return draft_topk(
            self._draft.logits(hidden),
            self._plan.width,
            positions,
            temperature=state.sampling.temperature if self._draft.shared_noise else 0.0,
            seed=state.sampling.seed,
            exclude=self._draft.exclude,
        )

    def _positions(self, positions: Tensor) -> Tensor:
        return positions.clamp(max=self._context - 1)


def _rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, k] of hidden [B, R, H] -> [B, k, H]."""
    return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))


@lru_cache(maxsize=64)
def _chain(length: int, device: torch.device) -> Tensor:
    """Ancestors [1, length, W] of a chain."""
    return pack_ancestors(torch.arange(-1, length - 1, dtype=torch.int32, device=device)[None])


def _check_vocabulary(vocabulary: Tensor, spec: TargetSpec) -> None:
    """Checks the ids that a reduced head may propose."""
    ids = vocabulary.tolist()
    if ids != sorted(set(ids)) or not 0 <= ids[0] <= ids[-1] < spec.vocab_size:
        raise ValueError(f"eagle vocabulary: expected ascending ids in [0, {spec.vocab_size}), got others")
    if media := sorted(spec.media_ids & set(ids)):
        raise ValueError(f"eagle vocabulary: expected no image or video ids, got {media}")
