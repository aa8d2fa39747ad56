"""The ops of `specvlm_kernels`, with the same names and signatures, in plain torch.

What the kernels are tested against, and what serves on CPU. They compute in max(input dtype, fp32) and check nothing.
"""

from .acceptance import Accepted, accept, draw
from .distillation import soft_cross_entropy, total_variation
from .drafting import draft_topk
from .kv_cache import compact_kv, write_kv
from .ratio_acceptance import accept_ratio
from .relaxed_acceptance import accept_typical, accept_within
from .token_pooling import conv_tokens, pool_tokens, prune_tokens, resample_tokens
from .tree_attention import pack_ancestors, tree_attention

__all__ = [
    "Accepted",
    "accept",
    "accept_ratio",
    "accept_typical",
    "accept_within",
    "compact_kv",
    "conv_tokens",
    "draft_topk",
    "draw",
    "pack_ancestors",
    "pool_tokens",
    "prune_tokens",
    "resample_tokens",
    "soft_cross_entropy",
    "total_variation",
    "tree_attention",
    "write_kv",
]
