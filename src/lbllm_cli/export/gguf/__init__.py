"""What a GGUF file says beside its weights, as llama.cpp reads it."""
