"""What a packed model runs in: linears, quantizers, cache, and the backends that compute them."""
