"""What the tensors of a traced model hold for some images: made call by call, and let go when nothing reads them any more.

Early tensors are large, and have many positions of each image; late ones are small, and have few. So as many images are in a
stream as fit where it is: the others wait, and come in later, each batch through all the calls at once.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from keras import ops

from keras_morph.channels import Call, ChannelGraph
from keras_morph.errors import DataError
from keras_morph.graph.examples import MOST_ELEMENTS, elements
from keras_morph.graph.replaying import called, inferring
from keras_morph.keras_internals import functional_in, mask_of

__all__ = ["Stream"]


class Stream:
    """The tensors of a traced model in inference, in batches: `stream[tensor]` runs the calls up to the one that makes it.

    All tensors that are there have the same batches: the first so many of those that were given.

    Args:
        graph: the traced model.
        batches: as `image_batches` gives them.
        looks: tensors that are looked at from outside, each as often as it stands here; `release` ends a look.
        most: elements of a tensor for all images; the first batch is always there.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        batches: Sequence[Sequence[Any]],
        looks: Iterable[int] = (),
        *,
        most: int = MOST_ELEMENTS,
    ) -> None:
        self.graph, self.batches = graph, batches
        self.calls = [call for call in graph.calls if call.mode != "input"]
        self.uses, self.last = Counter(looks), dict.fromkeys(graph.inputs, -1)
        for number, call in enumerate(self.calls):
            self.uses.update(set(call.numbers.values()))
            self.last.update(dict.fromkeys((*call.numbers.values(), *call.outputs), number))
        self.admitted = _admitted(graph, self.calls, batches, most)
        self.done, self.present = 0, 0  # calls, batches
        self.values: dict[int, list[Any]] = {number: [] for number in graph.inputs}
        self._admit()

    def __getitem__(self, tensor: int) -> list[Any]:
        while tensor not in self.values:
            self.run()
        return self.values[tensor]

    def finite(self, tensor: int, layer: str) -> list[Any]:
        """What a layer reads, to compute with.

        Raises:
            DataError: if there is NaN or infinity in it. The examples themselves may have some, such as masks that are added.
        """
        values = self[tensor]
        if not all(bool(ops.all(ops.isfinite(value))) for value in values):
            raise DataError(
                f"Expected examples for which {layer} reads finite numbers. Received: some for which it reads NaN or infinity; "
                "leave these out."
            )
        return values

    def __iter__(self) -> Iterator[Call]:
        """The calls to come; each is run after the body of the loop."""
        while self.done < len(self.calls):
            yield self.calls[self.done]
            self.run()

    def run(self) -> None:
        """The next call, for the batches that are there; then those come in for which there is room by now."""
        call = self.calls[self.done]
        results = [
            self._results(call, lambda number, batch=batch: self.values[number][batch]) for batch in range(self.present)
        ]
        for place, output in enumerate(call.outputs):
            self.values[output] = [result[place] for result in results]
        for tensor in set(call.numbers.values()):
            self.release(tensor)
        self.done += 1
        self._admit()

    def release(self, tensor: int) -> None:
        """A call or a look is done with a tensor."""
        self.uses[tensor] -= 1
        if self.uses[tensor] <= 0:
            self.values.pop(tensor, None)

    def _results(self, call: Call, value: Any) -> list[Any]:
        operation = inferring(self.graph.layers[call.layer].operation)
        return [_detached(result) for result in called(call, operation, lambda number, _: value(number))]

    def _admit(self) -> None:
        while self.present < self.admitted[self.done]:
            values = self._caught_up(self.batches[self.present])
            for tensor, those in self.values.items():
                those.append(values[tensor])
            self.present += 1

    def _caught_up(self, batch: Sequence[Any]) -> dict[int, Any]:
        """The tensors that are there, of a batch that was not yet."""
        sources = functional_in(self.graph.model).inputs
        values = {
            number: ops.convert_to_tensor(array, source.dtype)
            for number, array, source in zip(self.graph.inputs, batch, sources, strict=True)
        }
        for number, call in enumerate(self.calls[: self.done]):
            values.update(zip(call.outputs, self._results(call, values.__getitem__), strict=True))
            for tensor in {*call.numbers.values(), *call.outputs} - self.values.keys():
                if self.last[tensor] <= number:
                    del values[tensor]
        return values


def _admitted(graph: ChannelGraph, calls: Sequence[Call], batches: Sequence[Sequence[Any]], most: int) -> list[int]:
    """How many batches there is room for before each call; what comes in has room to the end."""
    images = list(accumulate(len(batch[0]) for batch in batches))
    largest = [
        max((elements(graph.tensors[tensor]) for tensor in (*call.numbers.values(), *call.outputs)), default=1)
        for call in calls
    ]
    to_come = list(accumulate(reversed(largest), max))[::-1]
    room = [max(1, sum(count * each <= most for count in images)) for each in to_come]
    return [*room, room[-1] if room else len(batches)]


def _detached(x: Any) -> Any:
    """Without what a gradient would need, which PyTorch keeps; a copy would lose a Keras mask."""
    return x if mask_of(x) is not None else ops.stop_gradient(x)
