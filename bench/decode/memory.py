"""What of the device's memory decoding takes besides weights and the KV slab."""

import gc
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from bench.decode.figures import Figure, Kind, Teller
from bench.decode.run import Run, answering
from specvlm.drafts import NoDraft

SECTION = "memory"
WEIGHTS, SLAB, PEAK, REST, GRAPHS = "weights", "KV slab", "peak", "peak less weights and KV slab", "graphs"
_GIB = 2**30


def begin() -> None:
    """Gives back what making the model left over, and watches for the peak from now on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(run: Run) -> Iterator[Figure]:
    """The peak since `begin`, which is that of the device's memory that torch has taken, and what it consists of."""
    subject = run.subject
    tell = Teller(Kind.RANDOM, subject.size.name, SECTION)
    with torch.inference_mode(), answering(subject, NoDraft()) as (state, _):
        slab = state.slab.nbytes
    held = [*subject.model.target.model.parameters(), *subject.model.target.model.buffers()]
    for draft in subject.drafts.values():
        held += draft.held()
    weights = stored(held)
    yield tell.one(WEIGHTS, "GiB", weights / _GIB, drafts=len(subject.drafts))
    yield tell.one(SLAB, "GiB", slab / _GIB)
    if subject.device.type != "cuda":
        for name in (PEAK, REST, GRAPHS):
            yield tell.none(name, "GiB", "a CPU's memory is not counted")
        return
    peak = torch.cuda.max_memory_reserved()
    yield tell.one(PEAK, "GiB", peak / _GIB)
    yield tell.one(REST, "GiB", (peak - weights - slab) / _GIB)
    yield tell.one(GRAPHS, "GiB", getattr(subject.recorder, "bytes", 0) / _GIB)


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of what stands behind the tensors, each storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
