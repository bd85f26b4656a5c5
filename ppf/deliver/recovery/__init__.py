"""Recovery training: a pruned checkpoint learns to do with what is left, taught by the dense model it came from."""

from .recover import recover
from .settings import METHODS, RecoverySettings

__all__ = ["METHODS", "RecoverySettings", "recover"]
