"""A target whose language model runs through an own decoder, for Llama and what is made like it.

Weights stay Hugging Face's, and its modules go on working (`llama_layers`). Between the products stand the kernels of
`specvlm_kernels`, keys and values go straight into the slab, and rotary tables come from the model's own rotary module.
Vision tower, prompt, embedding and head are `HFTarget`'s.
"""

from collections.abc import MutableMapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from specvlm.graphs import PLAIN_DESK, CudaRecorder, Desk, Recorder, RecordingDesk
from specvlm.state import capacity
from specvlm.targets.hf import HFTarget
from specvlm.targets.hf_attention import AttentionStep, head_size
from specvlm.targets.llama_layers import hooks_why_not, layer_of, layer_why_not, rotary_tables, through
from specvlm_kernels import add_rms_norm, pack_ancestors

#: The layers whose mathematics the own decoder is; a subclass may be anything.
LAYERS: Final = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)

#: How far the own decoder's states may lie from Hugging Face's, over their norm: rounding in 32 layers, and no more.
AGREEMENT: Final = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}

#: What the check at load sends through both: a prompt, and a tree on top of it.
_PROMPT: Final = 8
_PARENTS: Final = (-1, 0, 0, 1, 2, 2, 5)


class LlamaDecoder:
    """The layers and the last norm of a language model.

    Args:
        language: Hugging Face's, which `why_not` found nothing against. Its parameters become views of fused tensors;
            a parameter that is replaced later, not written to, is not followed.

    Attributes:
        tables: cosines and sines [context, D / 2] of its rotations.

    Raises:
        ValueError: its rotations are not a table's.
    """

    def __init__(self, language: PreTrainedModel) -> None:
        text: Any = language.config
        self._eps = float(text.rms_norm_eps)
        self.tables = rotary_tables(language.rotary_emb, text.max_position_embeddings, head_size(text))
        self._layers = [layer_of(layer) for layer in language.layers]
        self._entering = [layer.input_layernorm.weight.detach() for layer in language.layers]
        self._norm = language.norm.weight.detach()

    def __call__(
        self, embeds: Tensor, positions: Tensor, slab: Tensor, step: AttentionStep, taps: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor]:
        """Post-final-norm states [B, T, H], and features [B, T, F]; the rows' KV is written to the slab.

        Args:
            embeds: [B, T, H].
            positions: [B, T] int32 rotary positions.
            slab: [L, 2, B, Hkv, S, D].
            step: where the rows go in it, and what they see.
            taps: layers whose inputs are the features; None: the states.
        """
        tapped: dict[int, Tensor] = {}
        rotation = (*self.tables, positions)
        x, stream = embeds, None
        layers = zip(self._entering, self._layers, slab.unbind(), strict=True)
        for index, (norm, layer, (keys, values)) in enumerate(layers):
            normed, stream = add_rms_norm(x, stream, norm, eps=self._eps)
            tapped[index] = stream
            x, stream = layer(normed, stream, keys, values, rotation, step)
        hidden, _ = add_rms_norm(x, stream, self._norm, eps=self._eps)
        return hidden, hidden if taps is None else torch.cat([tapped[tap] for tap in taps], dim=-1)


class LlamaTarget(HFTarget):
    """A LLaVA-1.5 or LLaVA-NeXT whose language model runs through the own decoder.

    Args:
        model: in memory, on its device, in its dtype; it is switched to evaluation, and can go on being used.
        tokenizer: for stop strings; None: there is none.
        recorder: what records the steps of a round, to be replayed; None: `CudaRecorder` on a GPU, nothing on a CPU.

    Raises:
        ValueError: the own decoder does not serve the model, or its states are not Hugging Face's; the message says
            which and by how much.
    """

    _decoder: LlamaDecoder | None = None

    def __init__(self, model: PreTrainedModel, tokenizer: Any | None = None, recorder: Recorder | None = None) -> None:
        super().__init__(model, tokenizer)
        if recorder is None and self.spec.device.type == "cuda":
            recorder = CudaRecorder(self.spec.device)
        self._recorder = recorder
        # Of each slab, whose addresses its recordings hold; with it they go.
        self._desks: MutableMapping[Tensor, RecordingDesk] = WeakIdKeyDictionary()
        if reason := why_not(self._language) or hooks_why_not(model.lm_head, "the output head"):
            raise ValueError(f"own decoder: {reason}")
        self._decoder = LlamaDecoder(self._language)
        error = self._disagreement()
        if not error <= (most := AGREEMENT[self.spec.dtype]):
            raise ValueError(
                f"own decoder: expected states within {most:g} of Hugging Face's, over their norm, got {error:.2g}"
            )
        self.why = f"own decoder: its states differ from Hugging Face's by {error:.1g} of their norm"

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of post-final-norm hidden states [..., H]; of few rows, by a row's own arithmetic."""
        return through(self.model.lm_head, hidden)

    def _desk(self, slab: Tensor) -> Desk:
        if self._recorder is None or torch.is_grad_enabled():
            return PLAIN_DESK
        return self._desks.setdefault(slab, RecordingDesk(self._recorder))

    def _forward(
        self, embeds: Tensor, positions: Tensor, slab: Tensor | None, step: AttentionStep, taps: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor]:
        if self._decoder is None or slab is None:  # without a slab: whole sequences, for a draft to learn from
            return super()._forward(embeds, positions, slab, step, taps)
        return self._decoder(embeds, positions, slab, step, taps)

    @torch.no_grad()
    def _disagreement(self) -> float:
        """How far the own decoder's states are from Hugging Face's on random tokens, over their norm."""
        spec = self.spec
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(spec.vocab_size, (1, _PROMPT + len(_PARENTS)), generator=generator).to(spec.device)
        embeds = self.embed(ids)
        parents = torch.tensor([_PARENTS], dtype=torch.int32)
        depths = [0]
        for parent in _PARENTS[1:]:
            depths.append(depths[parent] + 1)
        positions = torch.tensor([[*range(_PROMPT), *(_PROMPT + depth for depth in depths)]], dtype=torch.int32)
        parents, positions = parents.to(spec.device), positions.clamp(max=spec.context - 1).to(spec.device)
        kv_len = torch.zeros(1, dtype=torch.int32, device=spec.device)
        steps = AttentionStep(kv_len, None), AttentionStep(kv_len + _PROMPT, pack_ancestors(parents))
        shape = (spec.num_layers, 2, 1, spec.num_kv_heads, capacity(ids.shape[1]), spec.head_dim)
        slabs = self._pool.new(shape), self._pool.new(shape)
        errors = []
        for rows, step in zip((slice(0, _PROMPT), slice(_PROMPT, None)), steps, strict=True):
            asked = embeds[:, rows], positions[:, rows]
            own, _ = self._forward(*asked, slabs[0], step, None)
            theirs, _ = super()._forward(*asked, slabs[1], step, None)
            errors.append((own.double() - theirs.double()).norm() / theirs.double().norm())
        return float(torch.stack(errors).amax())


def target_for(model: PreTrainedModel, tokenizer: Any | None = None) -> HFTarget:
    """The fastest target for a model: with the own decoder, or, where that does not serve, Hugging Face's, which says
    why in `why`.

    Raises:
        ValueError: what neither serves.
    """
    try:
        return LlamaTarget(model, tokenizer)
    except ValueError as error:
        target = HFTarget(model, tokenizer)  # what is wrong with the model itself, it says as well
        target.why = str(error)
        return target


def why_not(language: PreTrainedModel) -> str | None:
    """What keeps the own decoder from serving a language model, as "name: expected X, got Y"; None: nothing."""
    text: Any = language.config
    for layer in language.layers:
        if type(layer) not in LAYERS:
            names = ", ".join(kind.__name__ for kind in LAYERS)
            return f"layers: expected {names}, got {type(layer).__name__}"
        if reason := layer_why_not(layer):
            return reason
    if text.hidden_act != "silu":
        return f"hidden_act: expected silu, got {text.hidden_act}"
    weight = language.layers[0].self_attn.q_proj.weight
    for name, parameter in language.named_parameters():
        if (parameter.dtype, parameter.device) != (weight.dtype, weight.device):
            place = f"{parameter.dtype} on {parameter.device}"
            return f"weights: expected all in {weight.dtype} on {weight.device}, got {name} in {place}"
    if weight.dtype not in AGREEMENT:
        return f"dtype: expected {', '.join(map(str, AGREEMENT))}, got {weight.dtype}"
    return hooks_why_not(language, "the language model")
