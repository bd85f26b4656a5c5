"""Recovery training: a pruned model, or all sizes of a run, learns to do with what is left, taught by the dense one."""

from .elastic import recover_elastic
from .recover import recover
from .settings import METHODS, ElasticSettings, RecoverySettings

__all__ = ["METHODS", "ElasticSettings", "RecoverySettings", "recover", "recover_elastic"]
