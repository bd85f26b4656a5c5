"""Fast generation: static caches, fused kernels, one graph replay a token. Falls back to transformers where it must."""

from .generation import accelerate

__all__ = ["accelerate"]
