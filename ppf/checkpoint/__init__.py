"""Reading and writing checkpoints: safetensors and JSON only, checked before use, never half-written."""

from .checks import check_checkpoint, read_config
from .hashes import fingerprint, verify
from .reading import load, load_decoder, load_generation_config, load_or_stream, load_tokenizer, resolve_device
from .source import Checkpoint
from .writing import save, save_stream

__all__ = [
    "Checkpoint",
    "check_checkpoint",
    "fingerprint",
    "load",
    "load_decoder",
    "load_generation_config",
    "load_or_stream",
    "load_tokenizer",
    "read_config",
    "resolve_device",
    "save",
    "save_stream",
    "verify",
]
