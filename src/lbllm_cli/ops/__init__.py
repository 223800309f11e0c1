"""Pure tensor functions: no I/O, no modules, no global state."""
