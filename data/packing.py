"""Packs short rows into rows of full length, to save computation on padding. Packed rows do not see each other.

The isolation comes from `position_ids`: they restart at 0 with every packed row, and Transformers makes a
block-diagonal causal mask from that when a model is called without `attention_mask` and without a cache. The first
label of every packed row is masked, because it would be predicted from the last token of the previous row.
"""

from collections.abc import Sequence
from operator import itemgetter

Row = dict[str, list[int]]


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


def pack_rows(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Packs rows `{"input_ids", "labels"}` into rows of at most `max_length` tokens, with `position_ids`.

    Call the model with `position_ids` and without `attention_mask`. Pad a batch with position 0, which makes each pad
    token a separate row.

    Raises:
        ValueError: a row is empty or longer than `max_length`.
    """
    packed = []
    for indices in pack([len(row["input_ids"]) for row in rows], max_length):
        row: Row = {"input_ids": [], "labels": [], "position_ids": []}
        for ids, labels in map(itemgetter("input_ids", "labels"), (rows[i] for i in indices)):
            row["input_ids"] += ids
            row["labels"] += [-100, *labels[1:]]
            row["position_ids"] += range(len(ids))
        packed.append(row)
    return packed
