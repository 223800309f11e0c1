"""Stage 2: weights, their codes and levels trained block by block."""
