"""What each kind of draft learns from a frozen target, a batch at a time.

Source: SpecVLM (2025), section 3.3: 0.1 cross-entropy with the target's distribution plus 1.0 Smooth L1 with its
features, on the answer's tokens. A draft with features of its own, a small model or an EAGLE-3 head, learns the
distribution alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specvlm.checks import check_int
from specvlm.config import Recipe
from specvlm.drafts.base import Draft
from specvlm.drafts.eagle import EagleDraft
from specvlm.drafts.eagle3 import Eagle3Draft
from specvlm.drafts.growing import rows_of
from specvlm.drafts.pairs import PairDraft
from specvlm.drafts.vlm import VLMDraft
from specvlm.targets.base import Choice, Prompt
from specvlm.targets.hf import HFTarget
from specvlm.targets.hf_attention import AttentionStep
from specvlm.training.losses import Losses, choice_losses, feature_loss, logit_losses
from specvlm.training.unrolling import Level, Read, levels


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig(Recipe):
    """How a draft is trained, and for how long.

    Attributes:
        steps: of the optimiser.
        accumulate: batches a step, whose rows all weigh the same; the processes of a training share them.
    """

    steps: int
    accumulate: int = 1

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)  # super() does not know a slotted dataclass
        check_int("steps", self.steps, low=1)
        check_int("accumulate", self.accumulate, low=1)


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole sequences of prompt and answer, padded at their ends.

    Attributes:
        inputs: input_ids [B, T], and the pictures, as the target's `teach` takes them.
        answers: [B, T] bool, true on the answers' tokens.
        ids: what the data call the sequences; may be left empty.
    """

    inputs: dict[str, Tensor]
    answers: Tensor
    ids: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """How many tokens a draft is to guess: those of an answer behind another of its tokens."""
        return int((self.answers[:, :-1] & self.answers[:, 1:]).sum())


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a batch taught.

    Attributes:
        loss: to be made smaller; a mean over the batch's rows.
        parts: what it is made of, by name, before any weight; no gradient.
        agreement: share of the tokens where draft and target hold the same one likeliest; no gradient.
    """

    loss: Tensor
    parts: Mapping[str, Tensor]
    agreement: Tensor


class Objective(Protocol):
    """What one draft is to learn of one target; both are bound to each other and stay where they are.

    Attributes:
        student: the draft's module, whose parameters learn.
        still: what of the student does not.
    """

    student: nn.Module
    still: nn.Module

    def lesson(self, batch: Batch, number: int) -> Lesson:
        """Target and draft on a batch; what is random in it follows from its number."""
        ...


class HeadObjective:
    """A head's: the target's distribution one token on and, for one that reads post-final-norm features, its feature
    there; after some steps on its own outputs as well, if it is told to take them.

    A head that can propose some tokens alone learns the target's distribution over these.
    """

    student: nn.Module
    still: nn.Module

    def __init__(self, target: HFTarget, draft: PairDraft, config: DistillConfig) -> None:
        self.student, self.still = draft.head, nn.Module()
        self._target, self._draft, self._config = target, draft, config

    def lesson(self, batch: Batch, number: int) -> Lesson:
        """Every level's losses on its rows, weighed by `unrolled_decay` to the level, over the rows of the first."""
        config, draft = self._config, self._draft
        taught, hidden = self._target.teach(batch.inputs, draft.taps)
        read = self._read(taught, hidden, batch.answers, number)
        share, weighed = 1.0, torch.zeros((), device=hidden.device)
        first: Losses | None = None
        for level in levels(draft.head, read, config.unrolled):
            found = self._losses(level, read)
            weighed = weighed + len(level.row) / max(batch.rows, 1) * share * found.weighed(config)
            share *= config.unrolled_decay
            first = first or found
        assert first is not None, "there is a level at least"
        if read.choice is None:
            return Lesson(weighed, first.told(), first.agreement)
        gate, told = choice_losses(read.choice), _chosen(read.choice)
        left_out = (1 - read.choice.rows[read.choice.picked]) * taught.image_mask.sum(dim=1)
        told["GFLOPs saved"] = left_out.mean() * pair_flops(draft.head) / 1e9
        return Lesson(weighed + gate.weighed(config), first.told() | gate.told() | told, first.agreement)

    def _read(self, taught: Prompt, hidden: Tensor, answers: Tensor, number: int) -> Read:
        """The pair of row j's feature and row j + 1's token is to say what the target says behind that token."""
        answers = answers.to(hidden.device)
        asked = answers.int().argmax(dim=1).int()  # what stands before the first answer
        noisy = replace(taught, features=self._noisy(taught.features, number), asked=asked)
        seen, pairs = self._draft.head.read(noisy)
        at = seen.positions[:, 1:].long()  # of the pairs' tokens
        # A pair counts where its token is in the answer, and so is the one to guess.
        counts = (answers & nn.functional.pad(answers[:, 1:], (0, 1))).gather(1, at)
        return Read(pairs, seen.guide, seen.choice, counts, rows_of(hidden, at))

    def _losses(self, level: Level, read: Read) -> Losses:
        draft = self._draft
        wanted = read.wanted[level.row, level.place]
        with torch.no_grad():
            teacher_logits = self._target.head(wanted)
        found = logit_losses(draft.logits(level.hidden), teacher_logits, self._config, vocabulary=draft.vocabulary)
        if draft.taps is not None or not self._config.feature_weight:  # it reads other features than it is to give
            return found
        return replace(found, parts={**found.parts, "feature": feature_loss(level.hidden, wanted)})

    def _noisy(self, features: Tensor, number: int) -> Tensor:
        """The features with the batch's own uniform noise."""
        config = self._config
        if not config.feature_noise:
            return features
        generator = torch.Generator(features.device).manual_seed(config.seed * 1_000_003 + number)
        uniform = torch.rand(features.shape, generator=generator, device=features.device, dtype=features.dtype)
        return features + (2 * uniform - 1) * config.feature_noise


class ModelObjective:
    """A small model's, whose vision tower stays as it is: the target's distribution, over the tokens that it knows.

    Raises:
        ValueError: features are to have noise, or steps to be unrolled, and it reads no features.
    """

    student: nn.Module
    still: nn.Module

    def __init__(self, target: HFTarget, draft: VLMDraft, config: DistillConfig) -> None:
        for name, none in (("feature_noise", 0), ("unrolled", 1)):
            if getattr(config, name) != none:
                raise ValueError(
                    f"{name}: expected {none}, for a small model reads no features, got {getattr(config, name)}"
                )
        self.student = draft.model
        self.still = draft.model.model.vision_tower if draft.sees else nn.Module()
        self._target, self._draft, self._config = target, draft, config

    def lesson(self, batch: Batch, number: int) -> Lesson:
        """Row i, which reads token i, is to say what the target says of token i + 1."""
        draft = self._draft
        taught, features = self._target.teach(batch.inputs)
        embeds, left_out = draft.read(taught)
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
        hidden = draft.forward(embeds, positions, None, AttentionStep(torch.zeros_like(left_out), None))
        answers = batch.answers.to(embeds.device)
        # As in decoding, the answer's first token is given.
        row, place = (answers[:, :-1] & answers[:, 1:]).nonzero(as_tuple=True)
        with torch.no_grad():
            teacher_logits = self._target.head(features[row, place])
        logits = draft.logits(hidden[row, place - left_out[row]])
        losses = logit_losses(logits, teacher_logits, self._config, vocabulary=draft.vocabulary)
        return Lesson(losses.weighed(self._config), losses.told(), losses.agreement)


def pair_flops(head: nn.Module) -> int:
    """What reading a pair costs a head: two operations a weight of its products, but for attention and its output."""
    left_out = ("compressor", "lm_head")
    weights = (p.numel() for name, p in head.named_parameters() if p.ndim == 2 and not name.startswith(left_out))
    return 2 * sum(weights)


def _chosen(choice: Choice) -> dict[str, Tensor]:
    """How often each of a compressor's options was picked, and the share of the pictures' rows that were left."""
    shares = nn.functional.one_hot(choice.picked, len(choice.options)).float().mean(dim=0)
    told = {f"chose {name}": share for name, share in zip(choice.options, shares, strict=True)}
    return told | {"rows left": choice.rows[choice.picked].mean()}


#: What a draft learns by, by its class.
OBJECTIVES: dict[type, Callable[[HFTarget, Any, DistillConfig], Objective]] = {
    EagleDraft: HeadObjective,
    Eagle3Draft: HeadObjective,
    VLMDraft: ModelObjective,
}


def objective_of(target: HFTarget, draft: Draft, config: DistillConfig) -> Objective:
    """What `draft`, which is bound to `target`, learns by.

    Raises:
        ValueError: drafts of its kind do not learn, it is bound to another target or to none, or `config` does not fit
            it.
    """
    if type(draft) not in OBJECTIVES:
        known = " or ".join(kind.__name__ for kind in OBJECTIVES)
        raise ValueError(f"draft: expected a {known}, which learn, got {type(draft).__name__}")
    bound = getattr(draft, "target", None)
    if bound is None or bound.model is not target.model:
        got = "one that is bound to none" if bound is None else "one that is bound to another"
        raise ValueError(f"draft: expected one that is bound to the target, got {got}")
    if getattr(draft, "e4m3", False):
        raise ValueError("draft: expected one that reads its own weights, got one that reads copies of 8 bits")
    return OBJECTIVES[type(draft)](target, draft, config)
