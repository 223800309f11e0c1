"""An export on a CPU without torch: the compiled library, and what reads a packed folder into it."""
