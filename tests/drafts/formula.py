"""A head's arithmetic in straight lines of torch, and a session held to it at every level of every tree."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from specvlm import SpecVLM
from specvlm.drafts import VLMDraft
from specvlm.drafts.heads import HeadConfig, HeadDraft
from specvlm.drafts.pairs import PairDraft
from specvlm.policies import History, TreePolicy
from specvlm.state import Limits, Sampling
from specvlm.tree import Beam, DraftTree, Growth, Plan, tree_from_lists
from tests.fakes import prompt_for

#: Outputs [T, H] for a chain of embeddings and fused features or outputs, [T, H] each, at positions 0 to T - 1.
StraightLine = Callable[[PairDraft, Tensor, Tensor], Tensor]
Chain = tuple[Tensor, Tensor]


def rms_norm(values: Tensor, scale: Tensor, config: HeadConfig) -> Tensor:
    return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * scale


def rotated(values: Tensor, positions: Tensor, config: HeadConfig) -> Tensor:
    """Heads [T, heads, D] turned to where they stand."""
    angle = positions[:, None] / config.rope_theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = values.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(
    entering: Tensor, weights: dict[str, Tensor], config: HeadConfig, positions: Tensor | None = None
) -> Tensor:
    """[T, H] of a chain [T, W], each seeing those before it; `weights` are a layer's, by their last names.

    Args:
        positions: [T] rotary ones; None: 0 to T - 1.
    """
    length, dim = len(entering), config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    at = torch.arange(length) if positions is None else positions

    def heads_of(name: str, count: int) -> Tensor:
        return (entering @ weights[f"self_attn.{name}.weight"].T).view(length, count, dim)

    q, k = (rotated(heads_of(name, count), at, config) for name, count in (("q_proj", heads), ("k_proj", kv_heads)))
    v = heads_of("v_proj", kv_heads)
    k, v = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
    later = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
    p = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", p, v).reshape(length, -1) @ weights["self_attn.o_proj.weight"].T


def gated(values: Tensor, weights: dict[str, Tensor]) -> Tensor:
    gate = torch.nn.functional.silu(values @ weights["mlp.gate_proj.weight"].T)
    return (gate * (values @ weights["mlp.up_proj.weight"].T)) @ weights["mlp.down_proj.weight"].T


def layer_weights(draft: HeadDraft, prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor for name, tensor in draft.head.state_dict().items() if name.startswith(prefix)
    }


class Pausing(TreePolicy):
    """Trees of one shape, and none in some rounds, which are counted from 0."""

    looks_back = False

    def __init__(self, plan: Plan, pauses: frozenset[int]) -> None:
        self._plan, self._pauses, self._round = plan, pauses, -1

    def plan(self, history: History) -> Plan:
        self._round += 1
        return Plan(1, 1, 1) if self._round in self._pauses else self._plan

    def widest(self, device: torch.device) -> int:
        return self._plan.width


def spread(draft: HeadDraft | VLMDraft, logits: Tensor) -> Tensor:
    """A draft's logits [..., r] over the target's vocabulary [..., V]; -inf for what it cannot propose."""
    ids = draft.vocabulary if isinstance(draft, PairDraft | VLMDraft) else None
    if ids is None:
        return logits
    whole = logits.new_full((*logits.shape[:-1], draft.target.spec.vocab_size), -torch.inf)
    return whole.index_copy_(-1, ids, logits)


def recorded(draft: HeadDraft | VLMDraft, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Beam]]:
    """Lists that the draft's logits, over the whole vocabulary, and the beams of its trees go to from now on."""
    logits: list[Tensor] = []
    beams: list[Beam] = []
    draft_logits, grow_beam = draft.logits, Growth.beam

    def record(hidden: Tensor) -> Tensor:
        found = draft_logits(hidden)
        logits.append(spread(draft, found))
        return found

    monkeypatch.setattr(draft, "logits", record)
    monkeypatch.setattr(Growth, "beam", lambda growth: beams.append(grow_beam(growth)) or beams[-1])
    return logits, beams


def known_chain(truth: list[int], said: int, length: int) -> DraftTree:
    """A draft that knows `truth`, of which `said` tokens are said: the next `length` of them."""
    known = truth[said - 1 : said + length]
    return tree_from_lists(known, list(range(-1, len(known) - 1)), device=torch.device("cpu"))


def check_rounds(
    specvlm: SpecVLM,
    draft: PairDraft,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    *,
    line: StraightLine,
    fused: Callable[[Tensor], Tensor],
    logits_of: Callable[[Tensor], Tensor],
    images: int = 1,
) -> None:
    """Ten rounds, of which every other accepts several tokens, and some have no tree: what the draft then missed, one
    token or several at a time, it reads later. Its logits at each node are the formula's.

    Args:
        plan: of every tree.
        line: the formula.
        fused: what pairs are made of [T, H], from the target's features [T, F].
        logits_of: [V] from an output [H].
        images: pictures in the prompt.
    """
    target = specvlm.target
    prompt_inputs = prompt_for(target.model, images)
    sampling = Sampling(1.0, 0, 1.0, torch.tensor([5]))
    state, prompt = target.prefill(prompt_inputs, sampling=sampling, limits=Limits(60), taps=draft.taps)
    state.first()
    pauses = frozenset({2, 3, 4, 7, 8})
    draft.policy = Pausing(plan, pauses)
    logits, beams = recorded(draft, monkeypatch)  # which a session takes with it
    session = draft.start(prompt, state)
    truth = specvlm.generate(**prompt_inputs, temperature=1.0, seed=5, max_new_tokens=60).tokens
    counts: list[int] = []
    # A chain of everything said so far, whose pairs are true: feature i with the embedding of token i + 1.
    embeds, features = [prompt.embeds[0, 1:]], [prompt.features[0, :-1]]
    for round_ in range(10):
        count = int(state.step.count[0])
        counts.append(count)
        embeds.append(target.embed(state.step.tokens[0, :count]))
        features.append(state.step.features[0, :count])
        logits.clear()
        beams.clear()
        tree = session.propose(state)
        assert len(logits) == (0 if round_ in pauses else plan.depth)
        if round_ not in pauses:
            chain = torch.cat(embeds), fused(torch.cat(features))
            out = line(draft, *chain)
            torch.testing.assert_close(logits[0][0, 0], logits_of(out[-1]), atol=1e-5, rtol=1e-5)
            _check_levels(draft, chain, out[-1], beams, logits, line, logits_of)
        if round_ % 2:  # a draft that knows makes the next chain longer than one pair
            tree = known_chain(truth, len(state.tokens[0]), 1 + round_)
        scores = target.verify(tree, state)
        state.commit(tree, scores, sampling.accept(tree, scores.logits, state.kv_len))
    assert max(counts) >= 5
    state.close()


def _check_levels(
    draft: PairDraft,
    chain: Chain,
    at_root: Tensor,
    beams: list[Beam],
    logits: list[Tensor],
    line: StraightLine,
    logits_of: Callable[[Tensor], Tensor],
) -> None:
    """Every node's logits: the chain, then the path to the node, whose features are its parents' outputs."""
    paths: list[tuple[list[Tensor], list[Tensor]]] = [([], [at_root])]
    for beam, level in zip(beams, logits[1:], strict=True):
        grown = []
        for row, (token, parent) in enumerate(zip(beam.tokens[0], beam.parent_rows[0].tolist(), strict=True)):
            tokens, outputs = paths[parent]
            tokens = [*tokens, token]
            path = draft.target.embed(torch.stack(tokens)), torch.stack(outputs)
            out = line(draft, *(torch.cat(pair) for pair in zip(chain, path, strict=True)))[-1]
            torch.testing.assert_close(level[0, row], logits_of(out), atol=1e-5, rtol=1e-5)
            grown.append((tokens, [*outputs, out]))
        paths = grown
