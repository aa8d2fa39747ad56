"""EAGLE-3's draft head: three levels of the target's features fused into one, and an output head of its own.

With E the embedding of token i + 1 and h the fused features of position i, or the output for the level above:

    h   = fc([tap 1, tap 2, tap 3])                               true features only
    x   = h + attention([input_layernorm(E), hidden_norm(h)])
    out = x + mlp(post_attention_layernorm(x))
    logits = lm_head(norm(out))                                   over the draft's own vocabulary

Row i of lm_head is the target's token i + d2t[i]; t2d says which of the target's tokens have a row.

Source: EAGLE-3 (Li et al., 2025).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from specvlm.drafts.heads import checked_taps, sizes_like
from specvlm.drafts.pairs import Output, PairConfig, PairDraft, PairHead, Pairs
from specvlm.targets.base import Target, TargetSpec
from specvlm.targets.hf_attention import AttentionStep, slab_cache
from specvlm.targets.llama_layers import LlamaLayer, Weight, is_few, layer_of, product, through
from specvlm.vocabulary import check_ids, check_vocabulary
from specvlm_kernels import add_rms_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3Config(PairConfig):
    """Sizes of a head, besides those of every head.

    Attributes:
        taps: the target's layers whose inputs are fused, low to high.
    """

    taps: tuple[int, ...]

    def __post_init__(self) -> None:
        PairConfig.__post_init__(self)  # super() does not know a slotted dataclass
        object.__setattr__(self, "taps", checked_taps(self.taps))

    @classmethod
    def for_target(
        cls, spec: TargetSpec, intermediate_size: int, draft_vocab_size: int | None = None
    ) -> "Eagle3Config":
        """A head with the target's own attention heads, which reads the inputs of its layers 2, L // 2 and L - 3."""
        layers = spec.num_layers
        taps = sorted(min(max(tap, 0), layers - 1) for tap in (2, layers // 2, layers - 3))
        return cls(
            **sizes_like(spec),
            intermediate_size=intermediate_size,
            draft_vocab_size=draft_vocab_size,
            taps=tuple(taps),
        )


class Eagle3Head(PairHead):
    """The head's weights, under the names of EAGLE-3's published checkpoints.

    Args:
        config: its sizes.
    """

    config: Eagle3Config
    #: [r] int64 by how much a row's token is above the row.
    d2t: Tensor
    #: [V] bool tokens that have a row.
    t2d: Tensor

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        width, rows = config.hidden_size, config.proposable
        self.fc = nn.Linear(len(config.taps) * width, width, bias=False)
        self.midlayer = _Midlayer(config)
        self.norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(width, rows, bias=False)
        self.register_buffer("d2t", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("t2d", torch.arange(config.vocab_size) < rows)

    @property
    def layer(self) -> Any:
        return self.midlayer

    @property
    def vocabulary(self) -> Tensor:
        """[r] int64 the target's token of each row of lm_head."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def set_vocabulary(self, ids: Tensor) -> None:
        """Makes `ids` [r] int64, ascending, the tokens of lm_head's rows."""
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))
        self.t2d.zero_()[ids] = True

    def fuse(self, features: Tensor) -> Tensor:
        """[B, T, H] from the taps' features, concatenated."""
        return through(self.fc, features)

    def forward(self, pairs: Pairs, slab: Tensor | Cache | None, step: AttentionStep) -> Tensor:
        """See `PairHead.forward`; a row that enters as it is stands for both sides of its pair."""
        hidden = pairs.hidden
        if pairs.direct is not None:
            hidden = torch.where(pairs.direct[..., None], pairs.embeds, hidden)
        return self.midlayer(
            pairs.embeds,
            hidden,
            position_embeddings=self.rotary(hidden, pairs.positions),
            past_key_values=slab_cache(slab, step),
            step=step,
        )


class _Midlayer(nn.Module):
    """A Llama layer whose attention reads embedding and feature side by side."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        width, layer = config.hidden_size, config.layer()
        self.hidden_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.input_layernorm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.self_attn = LlamaAttention(layer, layer_idx=0)
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(self.self_attn, name).out_features
            setattr(self.self_attn, name, nn.Linear(2 * width, rows, bias=False))
        self.mlp = LlamaMLP(layer)

    def forward(self, embeds: Tensor, hidden: Tensor, **attention: object) -> Tensor:
        pairs = torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(pairs, **attention)[0]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


@dataclass(frozen=True, slots=True)
class Eagle3Decoder:
    """See `PairDecoder`. Its products are the layer's: `fuse` is one of a round, not of a level, and stays as it is.

    Attributes:
        norms: [H] each, of embeddings and of hidden states.
        layer: the layer, whose attention reads both side by side.
        tables: cosines and sines of every position.
    """

    norms: tuple[Tensor, Tensor]
    layer: LlamaLayer
    tables: tuple[Tensor, Tensor]

    def __call__(self, pairs: Pairs, slab: Tensor, step: AttentionStep) -> Tensor:
        hidden = pairs.hidden
        if pairs.direct is not None:
            hidden = torch.where(pairs.direct[..., None], pairs.embeds, hidden)
        both = zip((pairs.embeds, hidden), self.norms, strict=True)
        entering = torch.cat([add_rms_norm(x, None, norm, eps=self.layer.eps)[0] for x, norm in both], dim=-1)
        keys, values = slab[0]
        more, stream = self.layer(entering, hidden, keys, values, (*self.tables, pairs.positions), step)
        return self.layer.added(more, stream)

    def weights(self) -> tuple[Weight, ...]:
        return self.layer.weights()

    def quantized(self) -> "Eagle3Decoder":
        return replace(self, layer=self.layer.quantized())


class Eagle3Draft(PairDraft):
    """An EAGLE-3 head as a draft; see `PairDraft` for its arguments.

    Example:
        >>> draft = Eagle3Draft.from_pretrained("folder")
        >>> model = specvlm.SpecVLM(hf_model, draft=draft)
    """

    kind = "eagle3"
    config_class = Eagle3Config
    head_class = Eagle3Head

    head: Eagle3Head
    _vocabulary: Tensor

    @property
    def taps(self) -> tuple[int, ...]:
        """The inputs of these layers of the target."""
        return self.head.config.taps

    def with_vocabulary(self, ids: Sequence[int]) -> "Eagle3Draft":
        """A draft of the same weights, copied, that proposes those of its tokens that are among `ids`.

        Args:
            ids: the EOS ids among them and no image id; `bind` checks that of what is left. See `read_vocabulary`.

        Raises:
            ValueError: none of them is, or one of them is no id of the target's vocabulary.
            TypeError: one of them is no integer.

        Source: FR-Spec (Zhao et al., 2025).
        """
        check_ids("eagle3 vocabulary", ids)
        wanted, tokens, size = set(ids), self.head.vocabulary.tolist(), self.head.config.vocab_size
        if outside := sorted(token for token in wanted if not 0 <= token < size):
            raise ValueError(f"eagle3 vocabulary: expected ids in [0, {size}), got {outside[0]}")
        rows = [row for row, token in enumerate(tokens) if token in wanted]
        if not rows:
            raise ValueError(f"eagle3 vocabulary: expected some of the head's {len(tokens)} tokens, got none")
        head = Eagle3Head(replace(self.head.config, draft_vocab_size=len(rows)))
        weights = self.head.state_dict()
        cut = {"lm_head.weight": weights["lm_head.weight"][rows], "d2t": head.d2t}
        head.load_state_dict(weights | cut)
        head.set_vocabulary(torch.tensor([tokens[row] for row in rows]))
        made = Eagle3Draft(head, self.policy, self.shared_noise)
        made.e4m3 = self.e4m3
        return made

    def check_fit(self, spec: TargetSpec) -> None:
        by_d2t, by_t2d = self.head.vocabulary.tolist(), self.head.t2d.nonzero()[:, 0].tolist()
        if outside := [token for token in by_d2t if not 0 <= token < spec.vocab_size]:
            raise ValueError(f"eagle3 d2t: expected tokens in [0, {spec.vocab_size}), got {outside[0]}")
        if len(by_t2d) != len(by_d2t):
            raise ValueError(f"eagle3 t2d: expected {len(by_d2t)} tokens, as many as in d2t, got {len(by_t2d)}")
        for row, (token, other) in enumerate(zip(by_d2t, by_t2d, strict=True)):
            if token != other:
                raise ValueError(f"eagle3 d2t: expected token {other} of t2d in row {row}, got {token}")
        if self.head.config.draft_vocab_size is not None:
            check_vocabulary("eagle3 d2t", by_d2t, spec)

    def fit(self, target: Target) -> None:
        super().fit(target)
        self._vocabulary = self.head.vocabulary

    def output_rows(self, target: Target) -> Output | None:
        return (Weight(self.head.lm_head.weight.detach()), None) if self.e4m3 else None

    def fused(self) -> Eagle3Decoder:
        layer = self.head.midlayer
        norms = layer.input_layernorm.weight.detach(), layer.hidden_norm.weight.detach()
        return Eagle3Decoder(norms, layer_of(layer), self._tables)

    @property
    def vocabulary(self) -> Tensor:
        return self._vocabulary

    def logits(self, hidden: Tensor) -> Tensor:
        norm = self.head.norm
        few = is_few(hidden) and not torch.is_grad_enabled()
        normed = add_rms_norm(hidden, None, norm.weight, eps=norm.variance_epsilon)[0] if few else norm(hidden)
        return through(self.head.lm_head, normed) if self._output is None else product(normed, *self._output)
