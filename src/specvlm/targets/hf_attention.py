"""How transformers' modeling code reaches our attention and our KV slab: its own two registries, nothing patched.

A forward carries its `AttentionStep` as a keyword, which transformers hands to the attention of every layer; the
cache it is given writes into the slab and returns the whole of it.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from specvlm_kernels import tree_attention, write_kv
from specvlm_kernels.tree_attention import HEAD_DIMS

ATTENTION = "specvlm"

#: Held while a language model is switched to our attention: its config is shared by all threads.
_SWITCHED = threading.RLock()

#: What a modeling file may hand to its attention without changing the result that ours computes.
_HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_hidden_states", "output_attentions"})


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What our attention needs besides q, k and v.

    Attributes:
        kv_len: [B] int32 slots that every row sees.
        ancestors: [B, N, W] packed bits over the slots from kv_len on; None: a prompt, causal, into an empty slab.
        first_slot: [B] int32 where this forward's KV goes; None: to kv_len and on.
        visible: [B, N, K] bool, in training: which of a growing cache's K keys each row sees, this forward's last.
    """

    kv_len: Tensor
    ancestors: Tensor | None
    first_slot: Tensor | None = None
    visible: Tensor | None = None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,  # no shorter than the context: `refuse_unsupported` has seen to that
    step: AttentionStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: q [B, Hq, T, D], and the slab's k and v [B, Hkv, S, D] -> [B, T, Hq, D]."""
    unknown = sorted(name for name, given in kwargs.items() if name not in _HARMLESS and given is not None)
    if unknown:
        raise ValueError(f"{type(module).__name__}: our attention lacks {', '.join(unknown)}, which this model needs")
    if step is None:
        raise ValueError(f"{ATTENTION} attention: expected a forward by specvlm, got one without its step")
    if attention_mask is not None or dropout:
        raise ValueError(f"{ATTENTION} attention: expected no mask and no dropout, got a forward with them")
    return attend(query.transpose(1, 2), key, value, step, scaling), None


def attend(query: Tensor, key: Tensor, value: Tensor, step: AttentionStep, scaling: float) -> Tensor:
    """Attention of rows [B, T, Hq, D] to k and v [B, Hkv, S, D], which hold the rows' own -> [B, T, Hq, D]."""
    if step.ancestors is not None:
        return tree_attention(query, key, value, step.kv_len, step.ancestors, scale=scaling)
    length = query.shape[1] if step.visible is None else key.shape[2]
    out = nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key[:, :, :length],
        value[:, :, :length],
        attn_mask=None if step.visible is None else step.visible[:, None],
        is_causal=step.visible is None,
        scale=scaling,
        enable_gqa=query.shape[2] != key.shape[1],
    )
    return out.transpose(1, 2)


AttentionInterface.register(ATTENTION, _attention)


class _SlabLayer(CacheLayerMixin):
    """One layer's part of a slab, as transformers' cache: new tokens go to slots first_slot and on."""

    def __init__(self, keys: Tensor, values: Tensor, first_slot: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self._first_slot = first_slot
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        write_kv(self.keys, self.values, key_states, value_states, self._first_slot)
        return self.keys, self.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the slab is there."""

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length

    def get_seq_length(self) -> int:
        raise NotImplementedError("a slab's length stays on the device; a forward is given its positions")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("our attention needs no mask")


def slab_cache(slab: Tensor | Cache | None, step: AttentionStep) -> Cache | None:
    """A slab [L, 2, B, Hkv, S, D] as the cache of one forward, which writes where `step` says; a cache as it is."""
    if not isinstance(slab, Tensor):
        return slab
    first_slot = step.kv_len if step.first_slot is None else step.first_slot
    keys, values = (half.unbind() for half in slab.unbind(1))
    return Cache(layers=[_SlabLayer(k, v, first_slot) for k, v in zip(keys, values, strict=True)])


def head_size(text: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


@contextlib.contextmanager
def our_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Switches a language model to our attention for one forward, so that it stays the user's own in between.

    Forwards of several threads come one after the other; one that transformers runs meanwhile would meet our attention.
    """
    with _SWITCHED:
        before = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = before


def run_language(
    language: PreTrainedModel,
    embeds: Tensor,
    positions: Tensor,
    slab: Tensor | None,
    step: AttentionStep,
    *,
    output_hidden_states: bool = False,
) -> Any:
    """One forward of a language model with our attention, as transformers returns it.

    Args:
        embeds: [B, T, H].
        positions: [B, T] rotary positions.
        slab: [L, 2, B, Hkv, S, D], to which the tokens' KV is written; None: nothing is kept.
        step: where the tokens go in it, and what they see.
    """
    with our_attention(language.config):
        return language(
            inputs_embeds=embeds,
            position_ids=positions,
            past_key_values=slab_cache(slab, step),
            use_cache=slab is not None,
            output_hidden_states=output_hidden_states,
            step=step,
        )


def refuse_unsupported(text: PreTrainedConfig) -> None:
    """Refuses a language model whose attention ours cannot compute.

    Raises:
        ValueError: naming the setting, what was expected and what came.
    """
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"):
        if getattr(text, name, None) is None:
            raise ValueError(
                f"language model: expected a Llama-, Mistral- or Qwen2-like one, got {text.model_type}, "
                f"whose config has no {name}"
            )
    head_dim = head_size(text)
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        raise ValueError(f"head_dim: expected {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, got {head_dim} in {text.model_type}")
    for name in ("attn_logit_softcapping", "attention_sink", "attention_chunk_size"):
        if getattr(text, name, None) is not None:
            raise ValueError(f"{name}: expected none, got {getattr(text, name)} in {text.model_type}")
    if text.model_type == "gpt_oss":
        raise ValueError("attention sinks: expected none, got a gpt_oss language model, which has them")
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if window is not None and window < text.max_position_embeddings:
        raise ValueError(
            f"sliding_window: expected none, or at least the context of {text.max_position_embeddings}, "
            f"got {window} in {text.model_type}"
        )
    other = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if other:
        raise ValueError(f"layer_types: expected full attention in every layer, got {', '.join(other)}")
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in {"dynamic", "longrope"}:
        raise ValueError(
            f"rope_type: expected one whose rotations do not depend on the length so far, got {rope!r}: "
            "a draft's reach would change the answer"
        )
