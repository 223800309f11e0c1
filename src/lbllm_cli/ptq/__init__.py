"""Stage 1: Hessian-weighted EM with error compensation."""
