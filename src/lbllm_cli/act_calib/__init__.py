"""Stage 3: quantizers of activations, keys and values."""
