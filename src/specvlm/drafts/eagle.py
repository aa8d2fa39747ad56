"""EAGLE's draft head: one decoder layer that continues the target's features.

The head reads pairs of the target's post-final-norm feature at position i and the embedding of token i + 1:
`fc([embedding, feature])`, one Llama layer, the target's own output head.

Sources: EAGLE-2 (Li et al., 2024); the optional input layer norm is SpecVLM's; the cut vocabulary is FR-Spec's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from specvlm.drafts.heads import sizes_like
from specvlm.drafts.pairs import Output, PairConfig, PairDraft, PairHead, Pairs
from specvlm.targets.base import Target, TargetSpec
from specvlm.targets.hf_attention import AttentionStep, slab_cache
from specvlm.targets.llama_layers import LlamaLayer, Weight, layer_of, product
from specvlm.vocabulary import check_ids, check_vocabulary
from specvlm_kernels import add_rms_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleConfig(PairConfig):
    """Sizes of a head, besides those of every head.

    Attributes:
        bias: the fc has one.
        input_layernorm: normalise what enters the layer's attention, as SpecVLM does; EAGLE does not.
    """

    bias: bool = True
    input_layernorm: bool = False

    @classmethod
    def for_target(cls, spec: TargetSpec, intermediate_size: int, input_layernorm: bool = False) -> "EagleConfig":
        """A head with the target's own heads."""
        return cls(**sizes_like(spec), intermediate_size=intermediate_size, input_layernorm=input_layernorm)


class EagleHead(PairHead):
    """The head's weights, under the names of EAGLE's published checkpoints.

    Args:
        config: its sizes.
    """

    config: EagleConfig
    #: [r] int64 the ids that a reduced head can propose.
    vocabulary: Tensor

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.fc = nn.Linear(2 * width, width, bias=config.bias)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config.layer(), layer_idx=0)])
        if not config.input_layernorm:
            self.layers[0].input_layernorm = nn.Identity()
        if config.draft_vocab_size is not None:
            self.register_buffer("vocabulary", torch.arange(config.draft_vocab_size))

    @property
    def layer(self) -> Any:
        return self.layers[0]

    def forward(self, pairs: Pairs, slab: Tensor | Cache | None, step: AttentionStep) -> Tensor:
        """See `PairHead.forward`; the pairs' `hidden` are post-final-norm features, or outputs."""
        joined = self.fc(torch.cat([pairs.embeds, pairs.hidden], dim=-1))
        if pairs.direct is not None:
            joined = torch.where(pairs.direct[..., None], pairs.embeds, joined)
        return self.layers[0](
            joined,
            position_embeddings=self.rotary(joined, pairs.positions),
            past_key_values=slab_cache(slab, step),
            use_cache=slab is not None,
            step=step,
        )


@dataclass(frozen=True, slots=True)
class EagleDecoder:
    """See `PairDecoder`.

    Attributes:
        fc: [H, 2 * H], and its bias [H], or None.
        norm: [H] what enters the layer's attention through it; None: nothing is normed.
        layer: the layer.
        tables: cosines and sines of every position.
    """

    fc: Weight
    bias: Tensor | None
    norm: Tensor | None
    layer: LlamaLayer
    tables: tuple[Tensor, Tensor]

    def __call__(self, pairs: Pairs, slab: Tensor, step: AttentionStep) -> Tensor:
        joined = product(torch.cat([pairs.embeds, pairs.hidden], dim=-1), self.fc, self.bias)
        if pairs.direct is not None:
            joined = torch.where(pairs.direct[..., None], pairs.embeds, joined)
        entering = joined if self.norm is None else add_rms_norm(joined, None, self.norm, eps=self.layer.eps)[0]
        keys, values = slab[0]
        more, stream = self.layer(entering, joined, keys, values, (*self.tables, pairs.positions), step)
        return self.layer.added(more, stream)

    def weights(self) -> tuple[Weight, ...]:
        return self.fc, *self.layer.weights()

    def quantized(self) -> "EagleDecoder":
        return replace(self, fc=self.fc.quantized(), layer=self.layer.quantized())


class EagleDraft(PairDraft):
    """An EAGLE head as a draft; see `PairDraft` for its arguments.

    Example:
        >>> draft = EagleDraft.from_pretrained("folder")
        >>> model = specvlm.SpecVLM(hf_model, draft=draft)
    """

    kind = "eagle"
    config_class = EagleConfig
    head_class = EagleHead

    head: EagleHead

    def with_vocabulary(self, ids: Sequence[int]) -> "EagleDraft":
        """A draft of the same weights, copied, that proposes `ids` alone; verification keeps the whole vocabulary.

        Args:
            ids: ascending, the EOS ids among them and no image id; `bind` checks that. See `read_vocabulary`.

        Raises:
            ValueError: there is none, or there are more than in the target's vocabulary.
            TypeError: one of them is no integer.

        Source: FR-Spec (Zhao et al., 2025).
        """
        check_ids("eagle vocabulary", ids)
        head = EagleHead(replace(self.head.config, draft_vocab_size=len(ids)))
        head.load_state_dict(self.head.state_dict() | {"vocabulary": torch.tensor(ids)})
        made = EagleDraft(head, self.policy, self.shared_noise)
        made.e4m3 = self.e4m3
        return made

    def check_fit(self, spec: TargetSpec) -> None:
        if self.head.config.draft_vocab_size is not None:
            check_vocabulary("eagle vocabulary", self.head.vocabulary.tolist(), spec)

    def output_rows(self, target: Target) -> Output | None:
        if self.head.config.draft_vocab_size is not None:
            ids = self.head.vocabulary
        elif self.e4m3:
            ids = torch.arange(target.spec.vocab_size, device=target.spec.device)
        else:
            return None
        rows, bias = target.head_rows(ids)
        return Weight(rows.detach()), None if bias is None else bias.detach()

    def fused(self) -> EagleDecoder:
        layer = self.head.layer
        norm, bias = layer.input_layernorm, self.head.fc.bias
        return EagleDecoder(
            fc=Weight(self.head.fc.weight.detach()),
            bias=None if bias is None else bias.detach(),
            norm=None if isinstance(norm, nn.Identity) else norm.weight.detach(),
            layer=layer_of(layer),
            tables=self._tables,
        )

    @property
    def vocabulary(self) -> Tensor | None:
        return None if self.head.config.draft_vocab_size is None else self.head.vocabulary

    def logits(self, hidden: Tensor) -> Tensor:
        return self.target.head(hidden) if self._output is None else product(hidden, *self._output)
