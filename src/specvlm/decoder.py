"""The decoding loop, and `SpecVLM`: a model that answers with a draft's help, and as it would without."""

import contextlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from specvlm.config import GenerateConfig
from specvlm.console import counting_bar
from specvlm.drafts import Draft, NoDraft, load_draft
from specvlm.drafts.base import Rehearsal
from specvlm.pictures import open_picture
from specvlm.state import Emitted, Limits, Sampling
from specvlm.stats import Stats, StatsRecorder
from specvlm.targets.base import Target, TargetSpec
from specvlm.targets.hf_loading import first_line
from specvlm.targets.llama import target_for
from specvlm.tree import BUCKETS

#: Answers end here when neither the call nor the model's generation config says where.
DEFAULT_MAX_NEW_TOKENS: Final = 256
#: Rounds of a warm-up's answers: a step is recorded the second time it comes, behind a first round of its own shape.
REHEARSED_ROUNDS: Final = 4

_OPTIONS = frozenset(option.name for option in fields(GenerateConfig))
_LOADED: Any = object()


@torch.inference_mode()
def decode(
    target: Target, draft: Draft, inputs: Mapping[str, Any], *, sampling: Sampling, limits: Limits
) -> Iterator[Emitted]:
    """Decodes one answer, a round at a time. What is emitted does not depend on `draft`; how soon, does.

    Args:
        target: whose answer it is.
        draft: is bound to `target`.
        inputs: as the target's processor gives them.
        sampling: how tokens are drawn, for one prompt.
        limits: when the answer ends.

    Yields:
        prefill's token, then what each round emitted.

    Raises:
        ValueError: the inputs do not fit the target; raised before any decoding.
    """
    draft.bind(target)
    state, prompt = target.prefill(inputs, sampling=sampling, limits=limits, taps=draft.taps)
    with contextlib.closing(state):
        session = draft.start(prompt, state)
        yield state.first()
        while not state.finished:
            tree = session.propose(state)
            scores = target.verify(tree, state)
            accepted = state.accept(tree, scores)
            yield state.commit(tree, scores, accepted)


@dataclass(frozen=True, slots=True)
class Answer:
    """What `SpecVLM.generate` returns.

    Attributes:
        sequences: [1, prompt + new] int64: the prompt as it was given, then the answer, as transformers returns it.
        tokens: the answer on the host.
        stats: how it went.
    """

    sequences: Tensor
    tokens: list[int]
    stats: Stats


class SpecVLM:
    """A vision-language model that answers with the help of a draft, and as it would answer without.

    Several threads may ask one model; forwards through its own modeling code take turns. The model's own `generate`
    must not run meanwhile: for the length of such a forward its config names our attention.

    Args:
        model: a `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration` in memory; it is switched to
            evaluation and can go on being used. Where the own decoder serves it, some weights move, to lie beside each
            other; `target` says which path it takes and why.
        draft: a Draft, the name of one without weights ("ngram"), a folder or a hub id; None: none.
        processor: the model's, for `ask` and for stop strings.

    Raises:
        ValueError: the model or the draft does not fit, naming why.
    """

    def __init__(self, model: PreTrainedModel, draft: Draft | str | Path | None = None, processor: Any = None) -> None:
        self._set(target_for(model, tokenizer=getattr(processor, "tokenizer", None)), draft, processor)

    @classmethod
    def from_target(cls, target: Target, draft: Draft | str | Path | None = None, processor: Any = None) -> "SpecVLM":
        """The same over any target."""
        made = cls.__new__(cls)
        made._set(target, draft, processor)
        return made

    def _set(self, target: Target, draft: Draft | str | Path | None, processor: Any) -> None:
        self.target, self.processor = target, processor
        self.draft = self._bound(draft)

    def generate(
        self, *, draft: Draft | str | Path | None = _LOADED, streamer: BaseStreamer | None = None, **kwargs: Any
    ) -> Answer:
        """Answers one prompt.

        Args:
            draft: another draft than the loaded one; None: autoregressive decoding by the same engine.
            streamer: is fed the prompt, then tokens as they come, then told the end, as transformers does.
            **kwargs: the processor's output as it is, and the fields of `GenerateConfig`: max_new_tokens,
                temperature, top_k, top_p, seed, stop_strings.

        Raises:
            TypeError: a keyword that is neither.
            ValueError: an input or an option that does not fit, before any decoding.
        """
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise TypeError(f"streamer: expected one with put and end, as transformers has, got {streamer!r}")
        rounds, seed = self._decode(kwargs, draft)
        recorder = StatsRecorder(seed)
        tokens: list[int] = []
        for emitted in rounds:
            recorder.add(emitted)
            if streamer is not None and not tokens:
                streamer.put(kwargs["input_ids"].cpu())
            tokens += emitted.tokens[0]
            if streamer is not None:
                streamer.put(torch.tensor(emitted.tokens[0]))
        if streamer is not None:
            streamer.end()
        prompt = kwargs["input_ids"]
        new = torch.tensor([tokens], dtype=prompt.dtype, device=prompt.device)
        return Answer(torch.cat([prompt, new], dim=1), tokens, recorder.stats())

    def stream(self, *, draft: Draft | str | Path | None = _LOADED, **kwargs: Any) -> Iterator[Emitted]:
        """Answers one prompt, a round at a time; takes what `generate` takes, but for the streamer.

        The prompt is checked and run when the first round is asked for. An iterator that is dropped half-way frees
        what it held. The first round is prefill's token.
        """
        return self._decode(kwargs, draft)[0]

    def warm_up(self, *, draft: Draft | str | Path | None = _LOADED, **kwargs: Any) -> None:
        """Answers a few rounds, with trees of every size and with the draft, so that the next answers find kernels
        compiled and, on a GPU, the steps of a round recorded. Shows how far it is.

        A prompt of another length may come to lie in a larger slab, whose steps are recorded as they come; so are
        those of a policy's other shapes.

        Args:
            draft, **kwargs: an example, as `generate` takes it.

        Raises:
            TypeError, ValueError: as `generate`.
        """
        names = [f"{nodes} nodes" for nodes in BUCKETS] + 2 * ["the draft"]
        bound = self.draft if draft is _LOADED else self._bound(draft)
        drafts: list[Draft] = [Rehearsal(nodes, bound.taps) for nodes in BUCKETS] + 2 * [bound]
        with counting_bar("warming up", len(drafts)) as show:
            for done, (name, each) in enumerate(zip(names, drafts, strict=True)):
                show(done, name)
                rounds = self._decode(kwargs, each)[0]
                for _ in islice(rounds, 1 + REHEARSED_ROUNDS):
                    pass
                del rounds  # and with it what it held
            show(len(drafts))

    def ask(self, image: Any, question: str, **options: Any) -> str:
        """Answers `question` about `image`: a picture, a picture file, or a list of them.

        Args:
            **options: what `generate` takes besides the processor's output.

        Raises:
            ValueError: no processor is there, or `image` is not a picture.
        """
        answer = self.generate(**self.prepare(image, question), **options)
        return self.processor.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()

    def prepare(self, image: Any, question: str) -> dict[str, Any]:
        """The processor's output for a question about one or several pictures, in the model's chat format.

        Args:
            image: a picture, a picture file, or a list of them, which may be empty.

        Returns:
            what `generate` takes: input_ids and attention_mask [1, T] and the pictures' tensors.

        Raises:
            ValueError: no processor with a chat template is there, it does not take the question, or `image` is not a
            picture.
        """
        if getattr(self.processor, "chat_template", None) is None:
            got = "none" if self.processor is None else "one without"
            raise ValueError(f"processor: expected one with a chat template, got {got}")
        if not isinstance(question, str):
            raise ValueError(f"question: expected a text, got {type(question).__name__}")
        pictures = [open_picture(one) for one in (image if isinstance(image, list | tuple) else [image])]
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
        try:
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            bos = self.processor.tokenizer.bos_token
            once = bos is None or not text.startswith(bos)  # some templates write it themselves
            made = self.processor(images=pictures or None, text=text, return_tensors="pt", add_special_tokens=once)
        except (ValueError, TemplateError) as error:
            raise ValueError(
                f"question: expected one that the model's template and processor take with {len(pictures)} pictures, "
                f"got {question[:80]!r}: {first_line(error)}"
            ) from error
        return dict(made)

    def _decode(self, kwargs: dict[str, Any], draft: Draft | str | Path | None) -> tuple[Iterator[Emitted], int]:
        """The rounds of one answer, and its seed."""
        for name in ("within", "ordinal"):
            if name in kwargs:
                raise TypeError(
                    f"{name}: expected none, for a text's ids stand in no order, got {kwargs[name]!r}; "
                    "specvlm_kernels.accept_within is for ids that do"
                )
        known = self.target.input_names | _OPTIONS
        if unknown := sorted(kwargs.keys() - known):
            raise TypeError(f"{', '.join(unknown)}: expected keywords among {', '.join(sorted(known))}")
        inputs = {name: value for name, value in kwargs.items() if name not in _OPTIONS}
        config = GenerateConfig(**{name: value for name, value in kwargs.items() if name in _OPTIONS})
        bound = self.draft if draft is _LOADED else self._bound(draft)
        seed = secrets.randbits(63) if config.seed is None else config.seed
        sampling = Sampling.of(config, seed, batch=1, device=self.target.spec.device)
        limits = limits_of(config, self.target.spec, inputs)
        return decode(self.target, bound, inputs, sampling=sampling, limits=limits), seed

    def _bound(self, draft: Draft | str | Path | None) -> Draft:
        if draft is None:
            return NoDraft()
        found = load_draft(draft) if isinstance(draft, str | Path) else draft
        if not isinstance(found, Draft) or isinstance(found, type):
            got = f"the class {found.__name__}" if isinstance(found, type) else type(draft).__name__
            raise TypeError(f"draft: expected a Draft, a name, a folder or None, got {got}")
        found.bind(self.target)
        return found


def limits_of(config: GenerateConfig, spec: TargetSpec, inputs: Mapping[str, Any]) -> Limits:
    """Where an answer ends: what the call says, else the model's generation config, else 256 tokens or the context.

    Raises:
        ValueError: the prompt, padding included, is as long as the generation config's max_length already.
    """
    input_ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    length = input_ids.numel() if isinstance(input_ids, Tensor) else 0  # prefill refuses what is no tensor
    limit = config.max_new_tokens or spec.max_new_tokens
    if limit is None and spec.max_length is not None:
        if length >= spec.max_length:
            raise ValueError(
                f"max_length: expected more than the prompt's {length} tokens, got {spec.max_length} in the model's "
                "generation config; max_new_tokens goes before it"
            )
        limit = spec.max_length - length
    if limit is None:
        kept = int(mask.sum()) if isinstance(mask, Tensor) else length
        limit = max(1, min(DEFAULT_MAX_NEW_TOKENS, spec.context - kept))
    return Limits(limit, spec.eos_ids, _stop_check(config.stop_strings, spec.tokenizer))


def _stop_check(strings: tuple[str, ...] | None, tokenizer: Any) -> Any:
    """Whether a sequence's last token completes a stop string, as transformers decides it."""
    if strings is None:
        return None
    if tokenizer is None:
        raise ValueError("stop_strings: expected a model loaded with its processor, got none")
    criteria = StopStringCriteria(tokenizer, list(strings))
    tail = criteria.maximum_token_len

    def completes_stop(tokens: Sequence[int]) -> bool:
        return bool(criteria(torch.tensor([tokens[-tail:]]), None)[0])

    return completes_stop
