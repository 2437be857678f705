"""Run NVIDIA NIM and vLLM on your own GPUs behind one OpenAI-compatible endpoint."""

__version__ = "0.1.0"
