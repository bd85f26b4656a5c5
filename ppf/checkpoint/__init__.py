"""Reading and writing checkpoints: safetensors and JSON only, checked before use, never half-written."""

from .checks import check_checkpoint
from .hashes import fingerprint, verify
from .reading import load, load_dense, load_tokenizer, resolve_device
from .writing import save

__all__ = [
    "check_checkpoint",
    "fingerprint",
    "load",
    "load_dense",
    "load_tokenizer",
    "resolve_device",
    "save",
    "verify",
]
