"""The backend without kernels of its own: torch, on any device."""
