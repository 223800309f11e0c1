"""lbllm: W(1+1)A4 binarization of large language models, from one GPU (LBLLM, arXiv 2604.19167)."""

__version__ = "0.1.0"
