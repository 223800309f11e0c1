"""What stages compute, as kernels: `TritonKernels` is the `StageKernels` of a GPU."""
