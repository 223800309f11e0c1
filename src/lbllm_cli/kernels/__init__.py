"""The compiled CPU kernels of the packed format, and how they are called."""
