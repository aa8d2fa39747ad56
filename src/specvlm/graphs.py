"""An answer's steps, recorded once for a slab and then replayed: on a GPU a step is launched by one call instead of
hundreds.

A recording holds addresses. So what a step reads lies at the same place in every round and in every answer that comes
to lie in the slab: a `Desk` keeps it there. What a step returns lies on the desk as well, until the next step that
returns the like; from there the next step reads it, and nothing is copied in between.
"""

import threading
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

#: Records a call and gives what replays it. Nothing has to have run when it returns.
Recorder = Callable[[Callable[[], Any]], Callable[[], Any]]


class Desk(Protocol):
    """Where the steps of an answer are run, and what they read and return lies; one answer has it at a time.

    Attributes:
        records: steps are replayed, and so wait for nothing on the host and meet no Python in between.
    """

    records: bool

    def keep(self, name: str, *given: Tensor) -> tuple[Tensor, ...]:
        """The tensors' values, where those of that name and these shapes always lie; what lay there is gone."""
        ...

    def room(self, name: str, make: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """A tensor of that name and shape, contents undefined: the one of the answer before, or a new one."""
        ...

    def run(
        self, key: Hashable, step: Callable[[], tuple[Any, ...]], reads: tuple[Tensor, ...], into: str
    ) -> tuple[Any, ...]:
        """What `step()` returns, each tensor as `keep` keeps it under the name `into`.

        Args:
            key: with what `reads` are and where they lie, it says all that the step depends on.
            step: waits for nothing on the host. What it changes in place, it changes once a call.
            reads: the tensors whose values may be others at the next call.
        """
        ...


class PlainDesk:
    """Runs every step as it comes, and keeps nothing."""

    records = False

    def keep(self, name: str, *given: Tensor) -> tuple[Tensor, ...]:
        """The tensors themselves."""
        return given

    def room(self, name: str, make: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """A new tensor."""
        return make()

    def run(
        self, key: Hashable, step: Callable[[], tuple[Any, ...]], reads: tuple[Tensor, ...], into: str
    ) -> tuple[Any, ...]:
        """What `step()` returns."""
        return step()


PLAIN_DESK = PlainDesk()


class RecordingDesk:
    """Runs a step as it is the first time, for its kernels are compiled and libraries take their workspaces then;
    records it the second time; and replays it from then on.

    Args:
        recorder: as `CudaRecorder`.
    """

    records = True

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._kept: dict[Hashable, Tensor] = {}
        self._returned: dict[Hashable, tuple[Any, ...]] = {}
        self._replays: dict[Hashable, Callable[[], Any]] = {}

    @property
    def recordings(self) -> int:
        """How many steps were recorded."""
        return len(self._replays)

    def keep(self, name: str, *given: Tensor) -> tuple[Tensor, ...]:
        """Copies of the tensors, unless they lie there already."""
        return tuple(self._put((name, place), one) for place, one in enumerate(given))

    def room(self, name: str, make: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """A tensor that stays with the desk."""
        if (name, shape) not in self._kept:
            self._kept[name, shape] = make()
        return self._kept[name, shape]

    def run(
        self, key: Hashable, step: Callable[[], tuple[Any, ...]], reads: tuple[Tensor, ...], into: str
    ) -> tuple[Any, ...]:
        """See `Desk.run`; what is no tensor is returned as it was the first time."""
        where = key, into, *((one.data_ptr(), one.shape) for one in reads)
        if where not in self._returned:
            self._returned[where] = returned = self._put_all(into, step())
            return returned
        if where not in self._replays:
            self._replays[where] = self._recorder(lambda: self._put_all(into, step()))
        self._replays[where]()
        return self._returned[where]

    def _put_all(self, name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            self._put((name, place), value) if isinstance(value, Tensor) else value
            for place, value in enumerate(values)
        )

    def _put(self, name: Hashable, given: Tensor) -> Tensor:
        kept = self._kept.get((name, given.shape, given.dtype))
        if kept is None:
            with torch.inference_mode(False):  # so that it can be written to in any mode
                kept = torch.empty(given.shape, dtype=given.dtype, device=given.device)
            self._kept[name, given.shape, given.dtype] = kept
        if kept.data_ptr() != given.data_ptr():
            with torch.no_grad():
                kept.copy_(given)
        return kept


class CudaRecorder:
    """Records CUDA graphs that share one memory pool; so they are replayed one after the other.

    Args:
        device: the GPU.

    Attributes:
        bytes: what the pool has taken of the device's memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._lock = threading.RLock()
        self._last: torch.cuda.Stream | None = None
        self.bytes = 0

    def __call__(self, call: Callable[[], Any]) -> Callable[[], None]:
        with self._lock, torch.cuda.device(self._device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # as the capture does, which would hide what the pool takes
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                call()
            self._pool = graph.pool()
            self.bytes += max(0, torch.cuda.memory_reserved() - before)

        def replay() -> None:
            with self._lock:
                stream = torch.cuda.current_stream(self._device)
                if self._last is not None and self._last != stream:
                    stream.wait_stream(self._last)
                self._last = stream
                graph.replay()

        return replay
