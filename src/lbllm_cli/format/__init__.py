"""The stored forms of weights, activations and cache records: arithmetic without files, nothing of training."""
