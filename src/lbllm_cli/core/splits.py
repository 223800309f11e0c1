"""How a stage's sequences are divided and ordered."""


def held_out_rows(rows: int, share: float) -> int:
    """Sequences held out of `rows`: at least one, and at least one is left. 256, 0.0625 -> 16; 2, 0.9 -> 1."""
    return min(max(1, round(share * rows)), rows - 1)


def spread_rows(rows: int, count: int) -> list[int]:
    """`count` of `rows` sequences, one out of each of as many equal parts. 32, 2 -> [0, 17]; 12, 4 -> [0, 4, 8, 9].

    Sources take turns: of a place that is the same in every part, two or four of them would have all or nothing, and of one that
    moves on by one in parts of eight three would. It moves on by the first step that gives two, three and four their shares.
    """
    part = rows // count
    found = [[i * rows // count + i * step % part for i in range(count)] for step in range(1, min(part, 12) + 1)]
    return min(found, key=lambda taken: max(2, _unevenness(taken)))


def _unevenness(rows: list[int]) -> int:
    """How much more often one of two, three or four sources that take turns has the rows than another."""
    counts = [[sum(row % sources == own for row in rows) for own in range(sources)] for sources in (2, 3, 4)]
    return max(max(count) - min(count) for count in counts)


def data_seed(seed: int, index: int) -> int:
    """Seed of what is drawn for block or phase `index`: of 22 bits, to be shifted by ten more. (1, 3) -> 1048579.

    torch's generator on a CPU takes the low 32 bits of a seed and drops the others.
    """
    # Two bits of the seed lie beside the index; an odd factor spreads the rest of it over all 22.
    return (((seed << 20) + index) ^ ((seed >> 2) * 0x9E3779B1)) % (1 << 22)
