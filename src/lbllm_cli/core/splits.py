"""How a stage's sequences are divided and ordered."""


def held_out_rows(rows: int, share: float) -> int:
    """Sequences held out of `rows`: at least one, and at least one is left. 256, 0.0625 -> 16; 2, 0.9 -> 1."""
    return min(max(1, round(share * rows)), rows - 1)


def spread_rows(rows: int, count: int) -> list[int]:
    """`count` of `rows` sequences, one out of each of as many equal parts. 32, 2 -> [0, 17]; 12, 4 -> [0, 4, 8, 9].

    Sources take turns: of a place that is the same in every part, two or four of them would have all or nothing. So it moves on
    by one from part to part.
    """
    part = rows // count
    return [i * rows // count + i % part for i in range(count)]


def data_seed(seed: int, index: int) -> int:
    """Seed of what is drawn for block or phase `index`: another for each, and small enough to be shifted by a few bits more."""
    return ((seed << 20) + index) % (1 << 50)
