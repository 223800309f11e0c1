"""How many sequences are held out of a stage's data."""


def held_out_rows(rows: int, share: float) -> int:
    """Sequences held out of `rows`: at least one, and at least one is left. 256, 0.0625 -> 16; 2, 0.9 -> 1."""
    return min(max(1, round(share * rows)), rows - 1)
