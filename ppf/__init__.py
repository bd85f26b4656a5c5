"""PPF: structural pruning of Llama-family language models.

    run = ppf.fit(model, text, output)          # learns once how much every layer can lose
    answer = run.policy(ratio=0.3)              # any size, in milliseconds
    model = run.materialize(answer.policy)      # a physically smaller Hugging Face model

Importing ppf registers ``ppf_llama`` with transformers' Auto classes.
"""

from .checkpoint import save
from .deliver.elastic.loading import load
from .deliver.recovery import RecoverySettings, recover
from .errors import InputError, PPFError
from .fast.runtime import accelerate
from .fitting import fit
from .fitting.run import Answer, Run, Settings
from .model import PPFLlamaConfig, PPFLlamaForCausalLM
from .model.grid import Grid
from .model.policy import Policy
from .model.structure import Structure

__all__ = [
    "Answer",
    "Grid",
    "InputError",
    "PPFError",
    "PPFLlamaConfig",
    "PPFLlamaForCausalLM",
    "Policy",
    "RecoverySettings",
    "Run",
    "Settings",
    "Structure",
    "accelerate",
    "fit",
    "load",
    "recover",
    "save",
]
