"""The backend of NVIDIA GPUs: kernels in Triton."""
