"""A target whose language model runs through an own decoder, for Llama and what is made like it.

Weights stay Hugging Face's, and its modules go on working: q, k and v become one tensor, gate and up another, and the
modules' parameters become views of its rows. Between the products stand the kernels of `specvlm_kernels`, keys and
values go straight into the slab, and rotary tables come from the model's own rotary module. Vision tower, prompt,
embedding and head are `HFTarget`'s.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from specvlm.graphs import PLAIN_DESK, CudaRecorder, Desk, Recorder, RecordingDesk
from specvlm.state import capacity
from specvlm.targets.hf import HFTarget
from specvlm.targets.hf_attention import AttentionStep, attend, head_size
from specvlm_kernels import (
    add_rms_norm,
    gated_linear,
    gated_silu,
    linear,
    linear_parts,
    pack_ancestors,
    rotary_linear,
    rotary_write_kv,
)
from specvlm_kernels.decoder_linear import FEW_ROWS

#: The layers whose mathematics the own decoder is; a subclass may be anything.
LAYERS: Final = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)

#: How far the own decoder's states may lie from Hugging Face's, over their norm: rounding in 32 layers, and no more.
AGREEMENT: Final = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}

#: Whose hooks look on and change nothing: transformers leaves them where it was once asked for hidden states.
CAPTURING: Final = "transformers.utils.output_capturing"

#: What the check at load sends through both: a prompt, and a tree on top of it.
_PROMPT: Final = 8
_PARENTS: Final = (-1, 0, 0, 1, 2, 2, 5)


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    """One layer's weights.

    Attributes:
        attention_norm, mlp_norm: [H].
        qkv: [(Hq + 2 Hkv) * D, H], and its bias, or None.
        out: [H, Hq * D].
        gate_up: [2 * I, H].
        down: [H, I].
    """

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class LlamaDecoder:
    """The layers and the last norm of a language model.

    Args:
        language: Hugging Face's, which `why_not` found nothing against. Its parameters become views of fused tensors;
            a parameter that is replaced later, not written to, is not followed.

    Raises:
        ValueError: its rotations are not a table's.
    """

    def __init__(self, language: PreTrainedModel) -> None:
        text: Any = language.config
        self._eps = float(text.rms_norm_eps)
        self._scale = float(language.layers[0].self_attn.scaling)
        self._cos, self._sin = rotary_tables(language)
        self._layers = [_layer_of(layer) for layer in language.layers]
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
        first_slot = step.kv_len if step.first_slot is None else step.first_slot
        tapped: dict[int, Tensor] = {}
        few = embeds.shape[0] * embeds.shape[1] <= FEW_ROWS
        x, stream = embeds, None
        for index, (layer, (keys, values)) in enumerate(zip(self._layers, slab.unbind(), strict=True)):
            normed, stream = add_rms_norm(x, stream, layer.attention_norm, eps=self._eps)
            tapped[index] = stream
            rotation = self._cos, self._sin, positions, keys, values, first_slot
            if few:
                q = rotary_linear(normed, layer.qkv, layer.qkv_bias, *rotation)
                x = linear_parts(attend(q, keys, values, step, self._scale).flatten(2), layer.out)
            else:
                q = rotary_write_kv(F.linear(normed, layer.qkv, layer.qkv_bias), *rotation)
                x = F.linear(attend(q, keys, values, step, self._scale).flatten(2), layer.out)
            normed, stream = add_rms_norm(x, stream, layer.mlp_norm, eps=self._eps)
            if few:
                x = linear_parts(gated_linear(normed, layer.gate_up), layer.down)
            else:
                x = F.linear(gated_silu(F.linear(normed, layer.gate_up)), layer.down)
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
        if reason := why_not(self._language):
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
        lm_head = self.model.lm_head
        few = hidden.dim() == 3 and hidden.shape[0] * hidden.shape[1] <= FEW_ROWS
        if torch.is_grad_enabled() or not few or type(lm_head) is not nn.Linear:
            return super().head(hidden)
        return linear(hidden, lm_head.weight, lm_head.bias)

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
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        others = [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        for product in (*projections, *others):
            if type(product) is not nn.Linear:  # an adapter, a quantised weight
                return f"projections: expected Linear, got {type(product).__name__}"
        if any(one.bias is not None for one in others):
            return "bias: expected none but of q, k and v, got one"
        if len({one.bias is None for one in projections}) > 1:
            return "bias: expected one for each of q, k and v, or none, got some"
    if text.hidden_act != "silu":
        return f"hidden_act: expected silu, got {text.hidden_act}"
    weight = language.layers[0].self_attn.q_proj.weight
    for name, parameter in language.named_parameters():
        if (parameter.dtype, parameter.device) != (weight.dtype, weight.device):
            place = f"{parameter.dtype} on {parameter.device}"
            return f"weights: expected all in {weight.dtype} on {weight.device}, got {name} in {place}"
    if weight.dtype not in AGREEMENT:
        return f"dtype: expected {', '.join(map(str, AGREEMENT))}, got {weight.dtype}"
    for name, module in language.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks) or "forward" in vars(module):
            return f"hooks: expected none, got one on {name or 'the language model'}"
    return None


@torch.no_grad()
def rotary_tables(language: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, D / 2] in fp32 of a language model's rotary module, a row a position.

    Raises:
        ValueError: the module does not turn a head's two halves by the same angles.
    """
    text: Any = language.config
    weight = language.norm.weight
    positions = torch.arange(text.max_position_embeddings, device=weight.device)[None]
    tables = language.rotary_emb(weight.new_empty(0, dtype=torch.float32), positions)
    half = head_size(text) // 2
    for table in tables:
        if table.shape[-1] != 2 * half or not torch.equal(table[..., :half], table[..., half:]):
            raise ValueError(
                f"own decoder: expected rotations of a head's {2 * half} elements in two halves of equal angles, got a "
                f"table {list(table.shape)}"
            )
    cos, sin = (table[0, :, :half].contiguous() for table in tables)
    return cos, sin


def _layer_of(layer: Any) -> LlamaLayer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [one.bias for one in projections]
    return LlamaLayer(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=fused([one.weight for one in projections]),
        qkv_bias=None if biases[0] is None else fused(biases),
        out=attention.o_proj.weight.detach(),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=fused([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight.detach(),
    )


@torch.inference_mode(False)
@torch.no_grad()
def fused(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One tensor with the rows of all parameters, which become views of it; if they are already, that tensor."""
    first, sizes = parameters[0].detach(), [len(parameter) for parameter in parameters]
    places = [parameter.data_ptr() - first.data_ptr() for parameter in parameters]
    row = first[0].nbytes
    if (
        all(parameter.is_contiguous() for parameter in parameters)
        and len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == 1
        and places == [row * sum(sizes[:i]) for i in range(len(sizes))]
    ):
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, view in zip(parameters, whole.split(sizes), strict=True):
        parameter.data = view
    return whole
