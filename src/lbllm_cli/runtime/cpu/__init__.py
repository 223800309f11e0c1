"""The CPU backend: a compiled library and what hands modules over to it."""
