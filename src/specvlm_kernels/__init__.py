"""Kernels for speculative decoding of vision-language models, usable on their own.

Every op takes CUDA (or ROCm) tensors, where it runs a Triton kernel, or CPU tensors, where it runs the plain torch of
`specvlm_kernels.reference`. None of them waits for the device.
"""

from .acceptance import Accepted, accept, draw
from .ancestors import pack_ancestors
from .decoder_linear import gated_linear, linear, linear_parts
from .decoder_ops import add_rms_norm, gated_silu
from .distillation import soft_cross_entropy, total_variation
from .drafting import draft_topk
from .kv_cache import compact_kv, write_kv
from .ratio_acceptance import accept_ratio
from .relaxed_acceptance import accept_typical, accept_within
from .rotary import rotary_linear, rotary_write_kv
from .token_pooling import conv_tokens, pool_tokens
from .token_pruning import prune_tokens
from .token_resampling import resample_tokens
from .tree_attention import tree_attention
from .tree_growth import rerank_tree, select_beam

__all__ = [
    "Accepted",
    "accept",
    "accept_ratio",
    "accept_typical",
    "accept_within",
    "add_rms_norm",
    "compact_kv",
    "conv_tokens",
    "draft_topk",
    "draw",
    "gated_linear",
    "gated_silu",
    "linear",
    "linear_parts",
    "pack_ancestors",
    "pool_tokens",
    "prune_tokens",
    "rerank_tree",
    "resample_tokens",
    "rotary_linear",
    "rotary_write_kv",
    "select_beam",
    "soft_cross_entropy",
    "total_variation",
    "tree_attention",
    "write_kv",
]
