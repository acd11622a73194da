"""Packs short rows into rows of full length, to save computation on padding. Packed rows do not see each other.

The isolation comes from `position_ids`: they restart at 0 with every packed row, and Transformers makes a
block-diagonal causal mask from that when a model is called without `attention_mask` and without a cache. The first
label of every packed row is masked, because it would be predicted from the last token of the previous row.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from data.rows import Row, zipped

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import NDArray


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: takes the longest row first, and puts each into the fullest bin with enough room.

    Returns lists of indices whose lengths add up to at most `capacity`. The number of bins is at most about 11/9 of the
    minimum (Johnson 1973, "Near-optimal bin packing algorithms"). The result depends only on the arguments.

    Raises:
        ValueError: a length of 0 or more than `capacity`.
    """
    bins: list[list[int]] = []
    # Bins by their remaining room. Bit r of `rooms` is set if there is a bin with room r, so the fullest bin with
    # enough room is the lowest set bit from `length` on.
    by_room: dict[int, list[int]] = {}
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if not 0 < length <= capacity:
            raise ValueError(f"row {index} has length {length}; rows to pack have 1 to {capacity}")
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            target = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, target = capacity, len(bins)
            bins.append([])
        bins[target].append(index)
        left = room - length
        if left:
            by_room.setdefault(left, []).append(target)
            rooms |= 1 << left
    return bins


class PackedRows(Sequence[Row]):
    """Packs rows `{"input_ids", "labels"}` into rows of at most `max_length` tokens, with `position_ids`.

    A packed row is put together when it is read. Call the model with `position_ids` and without `attention_mask`. Pad a
    batch with position 0, which makes each pad token a separate row.
    """

    def __init__(self, rows: Sequence[Row], lengths: "Sequence[int] | NDArray[np.int32]", max_length: int) -> None:
        """
        Args:
            lengths: tokens of each row, (N,).

        Raises:
            ValueError: a row is empty or longer than `max_length`.
        """
        import numpy as np

        bins = pack([int(length) for length in lengths], max_length)
        self._rows = rows
        self._places = np.fromiter((index for one in bins for index in one), dtype=np.int64, count=len(lengths))
        self._ends = np.cumsum([len(one) for one in bins])

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = self._ends[index - 1] if index else 0
        packed: Row = {"input_ids": [], "labels": [], "position_ids": []}
        for place in self._places[first : self._ends[index]]:
            row = self._rows[int(place)]
            packed["input_ids"] += row["input_ids"]
            packed["labels"] += [-100, *row["labels"][1:]]
            packed["position_ids"] += range(len(row["input_ids"]))
        return packed

    def dataset(self) -> "Dataset":
        """A data set for upstream trainers. It stores numbers of packed rows, which are put together when read."""
        import numpy as np
        from datasets import Dataset

        numbers = Dataset.from_dict({"packed": np.arange(len(self))})
        return numbers.with_transform(lambda batch: zipped([self[i] for i in batch["packed"]]))
