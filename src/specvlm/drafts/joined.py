"""A trained draft and the n-gram in one tree, whose nodes go to whichever is the surer.

A draft's candidates carry the probability that it gives them. The n-gram's continuation is given one as well, by how
often such a guess was right in this answer so far, and joins the candidates before the policy chooses among them:

    log P(node at depth d) = sum over j < d of log rate(n_j),     rate(n) = (hits(n) + 1) / (trials(n) + 2)

n_j is the length of the longest suffix that was seen before, with j tokens of the continuation taken for said: n, n + 1
and so on, up to the longest that is looked for. A trial is a token of the answer where there was something to guess.
"""

import copy
import math
from collections import defaultdict
from typing import Any, Protocol

import torch
from torch import Tensor

from specvlm.checks import check_int
from specvlm.drafts.base import Draft
from specvlm.policies import History, TreePolicy
from specvlm.state import DecodeState
from specvlm.targets.base import Prompt, Target
from specvlm.tree import Candidates, DraftTree, Plan, joined


class GrowingDraft(Draft, Protocol):
    """A draft that grows its trees by a policy.

    Attributes:
        policy: the trees' shape; sessions keep the one that was there when they started.
        exclude: [E] int64 ids that it never proposes, which `bind` sets.
    """

    policy: TreePolicy
    exclude: Tensor

    @property
    def sizes(self) -> dict[str, Any]:
        """What its speed hangs on."""
        ...


class JoinedDraft:
    """A draft that grows trees, with the n-gram's continuation among the candidates of every tree.

    Args:
        draft: one that has a policy: an EAGLE or EAGLE-3 head, or a small model.
        longest, shortest: lengths of the suffixes that are looked for, in tokens.

    Raises:
        TypeError: a draft without a policy, or a length that is no integer.
        ValueError: lengths that are not 1 <= shortest <= longest.

    Example:
        >>> draft = JoinedDraft(EagleDraft.from_pretrained("folder"))
        >>> model = specvlm.SpecVLM(hf_model, draft=draft)
    """

    def __init__(self, draft: GrowingDraft, *, longest: int = 4, shortest: int = 1) -> None:
        if not isinstance(getattr(draft, "policy", None), TreePolicy):
            raise TypeError(f"draft: expected one that grows its trees by a policy, got {type(draft).__name__}")
        check_int("shortest", shortest, low=1)
        check_int("longest", longest, low=shortest)
        self.draft = draft
        self.longest, self.shortest = longest, shortest

    @property
    def taps(self) -> tuple[int, ...] | None:
        """The features that the draft reads; the n-gram reads none."""
        return self.draft.taps

    @property
    def policy(self) -> TreePolicy:
        """The draft's. Setting it leaves the draft that was given as it is."""
        return self.draft.policy

    @policy.setter
    def policy(self, policy: TreePolicy) -> None:
        self.draft = _with_policy(self.draft, policy)

    @property
    def exclude(self) -> Tensor:
        """[E] int64 ids that neither proposes."""
        return self.draft.exclude

    @property
    def sizes(self) -> dict[str, Any]:
        """What its speed hangs on."""
        return {"draft": type(self.draft).__name__, **self.draft.sizes}

    def bind(self, target: Target) -> None:
        """Fits the draft to the target; the n-gram fits every one.

        Raises:
            ValueError: naming what does not fit.
        """
        self.draft.bind(target)

    def start(self, prompt: Prompt, state: DecodeState) -> "JoinedSession":
        """A session of the draft's, and what followed what in the prompt's text."""
        return JoinedSession(self, prompt, state)


class JoinedSession:
    """A draft's session on one answer, whose trees hold what the n-gram of that answer is sure of."""

    def __init__(self, draft: JoinedDraft, prompt: Prompt, state: DecodeState) -> None:
        barred = frozenset(draft.exclude.tolist())
        self._texts = [NGrams(draft.longest, draft.shortest, barred) for _ in state.prompt_ids]
        for text, ids in zip(self._texts, state.prompt_ids, strict=True):
            for token in ids:
                text.read(token)
        self._answered = [0] * len(self._texts)
        self._session = _with_policy(draft.draft, _Joining(draft.policy, self._texts)).start(prompt, state)

    def propose(self, state: DecodeState) -> DraftTree:
        """A tree by the draft's policy, of what either thought of; the root alone where the policy wants no more."""
        for row, (text, answer) in enumerate(zip(self._texts, state.tokens, strict=True)):
            for token in answer[self._answered[row] :]:
                text.judge(token)
                text.read(token)
            self._answered[row] = len(answer)
        return self._session.propose(state)


class NGrams:
    """What followed every n-gram of a text, and how often that would have been the right guess.

    Args:
        longest, shortest: n, at most and at least.
        barred: ids that are never guessed; they separate what stands before and after them.
    """

    def __init__(self, longest: int, shortest: int, barred: frozenset[int]) -> None:
        self._longest, self._barred = longest, barred
        self._lengths = range(longest, shortest - 1, -1)
        self._tail: tuple[int, ...] = ()  # the last tokens since a barred one
        self._count: dict[tuple[int, ...], int] = defaultdict(int)  # of an n-gram and what followed it
        self._follower: dict[tuple[int, ...], int] = {}  # the most frequent, of equals the latest
        self._hits = [0] * (longest + 1)
        self._trials = [0] * (longest + 1)

    def read(self, token: int) -> None:
        """Adds a token to the text."""
        if token in self._barred:
            self._tail = ()
            return
        for n in self._lengths:
            if n <= len(self._tail):
                gram = self._tail[-n:]
                self._count[*gram, token] += 1
                before = self._follower.get(gram, token)
                if self._count[*gram, token] >= self._count[*gram, before]:
                    self._follower[gram] = token
        self._tail = self._after(self._tail, token)

    def judge(self, token: int) -> None:
        """Takes in what the target said behind the text, before that is read."""
        if (guess := self._guess(self._tail)) is not None:
            n, guessed = guess
            self._trials[n] += 1
            self._hits[n] += guessed == token

    def rate(self, n: int) -> float:
        """How often the guess after a suffix of n tokens was right, in (0, 1), by the rule of succession."""
        return (self._hits[n] + 1) / (self._trials[n] + 2)

    def chain(self, depth: int) -> tuple[list[int], list[float]]:
        """At most `depth` tokens that may come next, each behind the one before, and their log-probabilities."""
        tokens: list[int] = []
        scores: list[float] = []
        tail, score = self._tail, 0.0
        while len(tokens) < depth and (guess := self._guess(tail)) is not None:
            n, token = guess
            score += math.log(self.rate(n))
            tokens.append(token)
            scores.append(score)
            tail = self._after(tail, token)
        return tokens, scores

    def _guess(self, tail: tuple[int, ...]) -> tuple[int, int] | None:
        """The length of the longest suffix of `tail` that was followed by something, and by what."""
        for n in self._lengths:
            if n <= len(tail) and (token := self._follower.get(tail[-n:])) is not None:
                return n, token
        return None

    def _after(self, tail: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*tail, token)[-self._longest :]


class _Joining(TreePolicy):
    """An answer's policy: another one, which chooses among the draft's candidates and the n-gram's."""

    on_device = False

    def __init__(self, policy: TreePolicy, texts: list[NGrams]) -> None:
        self._policy, self._texts = policy, texts
        self.looks_back = policy.looks_back

    def plan(self, history: History) -> Plan:
        return self._policy.plan(history)

    def widest(self, device: torch.device) -> int:
        return self._policy.widest(device)

    def admit(self, children: Tensor, parents: Tensor, depth: int, plan: Plan) -> Tensor:
        return self._policy.admit(children, parents, depth, plan)

    def select(self, candidates: Candidates, plan: Plan) -> DraftTree:
        depth = len(candidates.sizes)
        chains = [text.chain(depth) for text in self._texts]
        if any(tokens for tokens, _ in chains):
            device = candidates.tokens.device
            tokens = torch.tensor([tokens + [0] * (depth - len(tokens)) for tokens, _ in chains])
            scores = torch.tensor([scores + [-math.inf] * (depth - len(scores)) for _, scores in chains])
            candidates = joined(candidates, tokens.to(device, non_blocking=True), scores.to(device, non_blocking=True))
        return self._policy.select(candidates, plan)


def _with_policy(draft: GrowingDraft, policy: TreePolicy) -> GrowingDraft:
    """The draft, weights and target shared, with another policy."""
    made = copy.copy(draft)
    made.policy = policy
    return made
