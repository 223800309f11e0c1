"""Stage 2: weights, bitmaps and levels trained block by block."""
