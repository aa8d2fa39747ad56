"""What drafts share that are a head on the target's features: sizes, a folder on disk, the fit to a target."""

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig

from specvlm.checks import check_int, check_number
from specvlm.drafts.base import DraftSession
from specvlm.drafts.folder import load_strictly, read_folder, write_folder
from specvlm.drafts.growing import check_policy
from specvlm.policies import Eagle2, TreePolicy, checked_policy
from specvlm.state import DecodeState
from specvlm.targets.base import Prompt, Target, TargetSpec
from specvlm.targets.hf_attention import ATTENTION
from specvlm_kernels.tree_attention import HEAD_DIMS


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """Sizes of a head; hidden_size and vocab_size are the target's.

    Raises:
        ValueError, TypeError: a size that is out of its range or no number, by name.
    """

    #: Whose modules the layers are, in transformers.
    family: ClassVar[type[PreTrainedConfig]] = LlamaConfig

    hidden_size: int
    vocab_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

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

    def settings(self) -> dict[str, Any]:
        """The fields by name, as JSON holds them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def proposable(self) -> int:
        """How many tokens the head can propose."""
        return self.vocab_size

    def layer(self) -> PreTrainedConfig:
        """A decoder layer's settings, for transformers' modules."""
        made = self.family(
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


def checked_taps(taps: Any) -> tuple[int, ...]:
    """The target's layers whose inputs a head reads, when they are layers from low to high.

    Raises:
        ValueError, TypeError: they are not.
    """
    if not isinstance(taps, list | tuple) or not taps:
        raise ValueError(f"taps: expected one layer or more, got {taps!r}")
    for tap in taps:
        check_int("taps", tap, low=0)
    if list(taps) != sorted(taps):
        raise ValueError(f"taps: expected layers from low to high, got {list(taps)}")
    return tuple(taps)


class Head(nn.Module):
    """A head's weights.

    Args:
        config: its sizes.
    """

    config: HeadConfig

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config


class HeadDraft:
    """A head as a draft.

    Args:
        head: the weights.
        policy: the trees' shape; None: the usual one of its kind.
        shared_noise: choose candidates under the target's own sampling noise; False is the usual tree, whose
            candidates are the likeliest tokens whatever the target is about to draw.

    Raises:
        TypeError: the policy is none.
    """

    #: Its name on disk and in messages, and what it is read into.
    kind: ClassVar[str]
    config_class: ClassVar[type[HeadConfig]]
    head_class: ClassVar[type[Head]]
    #: The policy where none is given.
    usual_policy: ClassVar[Callable[[], TreePolicy]] = Eagle2
    #: It keeps the KV of the nodes that it expands.
    stores_trees: ClassVar[bool] = True

    head: Head
    #: What `bind` bound it to, and the ids that it never proposes there.
    target: Target
    exclude: Tensor

    def __init__(self, head: Head, policy: TreePolicy | None = None, shared_noise: bool = True) -> None:
        self.head = head.eval()
        self.policy = type(self).usual_policy() if policy is None else checked_policy(policy)
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
            ValueError: naming what does not fit (a size, a tap, ids that the head may propose, its policy), or a target
                of another device or dtype than the one it was bound to before.
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
            for parameter in self.head.parameters():  # and no buffers: the rotary frequencies stay in fp32
                parameter.data = parameter.data.to(spec.dtype)
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
        if self.taps is not None and self.taps[-1] >= spec.num_layers:
            raise ValueError(f"{self.kind} taps: expected layers below {spec.num_layers}, got {list(self.taps)}")
        among = f"{config.proposable} tokens that the head can propose"
        check_policy(self.policy, spec.device, config.proposable, among, stores_trees=self.stores_trees)

    @property
    def sizes(self) -> dict[str, Any]:
        """What its speed hangs on."""
        return self.head.config.settings()

    @property
    def recording(self) -> Hashable:
        """What a recording of its forwards depends on: its sizes, and where its weights lie."""
        weights = (tensor.data_ptr() for tensor in self.held())
        return self.kind, repr(self.sizes), *weights

    def held(self) -> Iterator[Tensor]:
        """What its forwards read besides a prompt and tokens."""
        yield from self.head.parameters()
        yield from self.head.buffers()
        yield self.exclude

    def start(self, prompt: Prompt, state: DecodeState) -> DraftSession:
        """A session that has read the prompt."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] over the target's vocabulary of outputs [B, T, H]; -inf for what it cannot propose."""
        raise NotImplementedError
