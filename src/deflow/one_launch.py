"""OneLaunch: what a GPU does again and again, recorded once as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Result = TypeVar("Result")

# Calls before the recording: in them, optimizers make their state, libraries their handles and torch.compile its code.
WARM_UPS = 3


class OneLaunch(Generic[Result]):
    """A function of tensors on a GPU that, after a few calls, costs the host one launch.

    What it computes stays the same, bit for bit. Its results are the same tensors at each call, which the next call
    overwrites, as it does what the function changes in place.

    Args:
        function: of tensors, or of tuples of them, whose shapes never change. It must not wait for the device, and what
            it keeps from one call to the next it must change in place.
        generators: from which it draws; whoever calls may seed them in between.
    """

    def __init__(self, function: Callable[..., Result], generators: Sequence[torch.Generator] = ()) -> None:
        self._function, self._generators = function, generators
        self._warm_ups = WARM_UPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Any = None
        self._results: Result | None = None

    def __call__(self, *inputs: Any) -> Result:
        if self._graph is None:
            if self._warm_ups:
                self._warm_ups -= 1
                return self._beside(inputs)
            self._record(inputs)
        else:
            torch._foreach_copy_(_tensors(self._inputs), _tensors(inputs), non_blocking=True)
        assert self._graph is not None
        self._graph.replay()
        return self._results  # type: ignore[return-value]

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """For all but the replays. Always the same: libraries keep memory for each stream that they have seen."""
        return torch.cuda.Stream()

    def _beside(self, inputs: Any) -> Result:
        """One call by itself, on a stream of its own, as CUDA graphs want those before a recording."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = self._function(*inputs)
        current.wait_stream(self._stream)
        return results

    def _record(self, inputs: Any) -> None:
        self._inputs = tree_map_only(Tensor, torch.clone, inputs)  # the caller's own are not to be written into
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        # Other threads, such as a tracker's, may go on using the device meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._results = self._function(*self._inputs)
        self._graph = graph


def _tensors(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
