"""Reading and writing checkpoints: safetensors and JSON only, checked before use, never half-written."""

from .checks import check_checkpoint, read_config
from .hashes import fingerprint, verify
from .reading import load, load_decoder, load_generation_config, load_or_stream, load_tokenizer, resolve_device
from .source import Checkpoint
from .sources import Located, local_folder, locate, recall
from .writing import save, save_model, save_stream

__all__ = [
    "Checkpoint",
    "Located",
    "check_checkpoint",
    "fingerprint",
    "load",
    "load_decoder",
    "load_generation_config",
    "load_or_stream",
    "load_tokenizer",
    "local_folder",
    "locate",
    "read_config",
    "recall",
    "resolve_device",
    "save",
    "save_model",
    "save_stream",
    "verify",
]
