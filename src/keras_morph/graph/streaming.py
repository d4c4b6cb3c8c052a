"""What the tensors of a traced model hold for some images: made call by call, and let go when nothing reads them any more."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from keras import ops

from keras_morph.channels import Call, ChannelGraph
from keras_morph.errors import DataError
from keras_morph.graph.replaying import called, inferring
from keras_morph.keras_internals import functional_in, mask_of

__all__ = ["Stream"]


class Stream:
    """The tensors of a traced model in inference, in batches: `stream[tensor]` runs the calls up to the one that makes it.

    Args:
        graph: the traced model.
        batches: as `image_batches` gives them.
        looks: tensors that are looked at from outside, each as often as it stands here; `release` ends a look.
    """

    def __init__(self, graph: ChannelGraph, batches: Sequence[Sequence[Any]], looks: Iterable[int] = ()) -> None:
        self.graph, self.batches = graph, len(batches)
        self.uses = Counter(looks)
        for call in graph.calls:
            self.uses.update(set(call.numbers.values()))
        dtypes = [source.dtype for source in functional_in(graph.model).inputs]
        self.values = {
            number: [ops.convert_to_tensor(batch[place], dtype) for batch in batches]
            for place, (number, dtype) in enumerate(zip(graph.inputs, dtypes, strict=True))
        }
        self.ahead = (call for call in graph.calls if call.mode != "input")

    def __getitem__(self, tensor: int) -> list[Any]:
        while tensor not in self.values:
            self.run(next(self.ahead))
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
        for call in self.ahead:
            yield call
            self.run(call)

    def run(self, call: Call) -> None:
        operation = inferring(self.graph.layers[call.layer].operation)
        results = [
            called(call, operation, lambda number, _, batch=batch: self.values[number][batch])  # type: ignore[misc]
            for batch in range(self.batches)
        ]
        for place, output in enumerate(call.outputs):
            self.values[output] = [_detached(result[place]) for result in results]
        for tensor in set(call.numbers.values()):
            self.release(tensor)

    def release(self, tensor: int) -> None:
        """A call or a look is done with a tensor."""
        self.uses[tensor] -= 1
        if self.uses[tensor] <= 0:
            self.values.pop(tensor, None)


def _detached(x: Any) -> Any:
    """Without what a gradient would need, which PyTorch keeps; a copy would lose a Keras mask."""
    return x if mask_of(x) is not None else ops.stop_gradient(x)
