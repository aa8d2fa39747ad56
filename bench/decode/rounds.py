"""What a round takes: the target's forward by the tree's size, and with an EAGLE head part by part."""

import random
from collections.abc import Iterator

import torch

from bench.decode.figures import Figure, Kind, Teller, in_turn
from bench.decode.models import HEADS
from bench.decode.run import PARTS, WHOLE, Run, answering, timed_rounds
from specvlm.drafts import EagleDraft, NoDraft
from specvlm.tree import BUCKETS, DraftTree, root_only, tree_from_lists

VERIFY, ROUND = "verify", "round"
OVER_ONE = "64 nodes over one node"
STEP = "AR step"


def over_step(draft: str) -> str:
    """The figure of a round over an AR step, by the draft's name."""
    return f"{draft}, over an AR step"


def growth_bandwidth(draft: str) -> str:
    """The figure of what a tree's growth reads over what a copy would, by the draft's name."""
    return f"{draft}, grow, share of the copy bandwidth"


@torch.inference_mode()
def verification(run: Run) -> Iterator[Figure]:
    """The target's forward of trees of every size, taken in turn."""
    subject = run.subject
    target, tell = subject.model.target, Teller(Kind.RANDOM, subject.size.name, VERIFY)
    with answering(subject, NoDraft()) as (state, _):
        trees = {nodes: state.laid(some_tree(nodes, state.root, target.spec.vocab_size)) for nodes in BUCKETS}
        calls = {name_of(nodes): lambda tree=tree: target.verify(tree, state) for nodes, tree in trees.items()}
        seconds = in_turn(calls, subject.device, subject.size.repeats)
    context = subject.size.prompt_tokens
    figures = [tell.many(name, "ms", [1e3 * one for one in times], context=context) for name, times in seconds.items()]
    yield from figures
    values = {figure.name: figure.value for figure in figures}
    yield tell.one(OVER_ONE, "x", values[name_of(64)] / values[name_of(1)])


def name_of(nodes: int) -> str:
    """The figure of a tree of that size."""
    return f"{nodes} node{'s' * (nodes > 1)}"


def some_tree(nodes: int, root: torch.Tensor, vocabulary: int) -> DraftTree:
    """Random tokens in a tree where every node has two children."""
    if nodes == 1:
        return root_only(root)
    rng = random.Random(nodes)
    tokens = [rng.randrange(vocabulary) for _ in range(nodes)]
    return tree_from_lists(tokens, [(node - 1) // 2 if node else -1 for node in range(nodes)], device=root.device)


def whole_rounds(run: Run) -> Iterator[Figure]:
    """Rounds of an AR step, and with a head of random weights, whose trees are hardly ever right."""
    subject, plan = run.subject, run.subject.size.plan
    tell, rounds = Teller(Kind.RANDOM, subject.size.name, ROUND), 3 * subject.size.repeats
    steps = timed_rounds(subject, NoDraft(), rounds)[WHOLE]
    step = tell.many(STEP, "ms", [1e3 * one for one in steps])
    yield step
    for name, draft in subject.drafts.items():
        seconds = timed_rounds(subject, draft, rounds)
        whole, *parts = (
            tell.many(f"{name}, {part}", "ms", [1e3 * one for one in seconds[part]], nodes=plan.nodes, depth=plan.depth)
            for part in (WHOLE, *PARTS)
        )
        yield whole
        yield tell.one(over_step(name), "x", whole.value / step.value)
        yield from parts
        level = level_bytes(draft, HEADS[name].itemsize or draft.target.spec.dtype.itemsize)
        share = plan.depth * level / (1e-3 * parts[0].value) / run.bandwidth
        yield tell.one(growth_bandwidth(name), "share", share, level=level)


def level_bytes(draft: EagleDraft, itemsize: int) -> int:
    """What a level of a tree reads: the head's weights, once, and the rows of the output head that it proposes by."""
    config = draft.head.config
    rows = config.proposable * config.hidden_size
    return itemsize * (rows + sum(weight.numel() for weight in draft.head.parameters()))
