"""PPF: structural pruning of Llama-family language models.

    run = ppf.fit(model, text, output)          # learns once how much every layer can lose
    answer = run.policy(ratio=0.3)              # any size, in milliseconds
    model = run.materialize(answer.policy)      # a physically smaller Hugging Face model

Importing ppf registers ``ppf_llama`` with transformers' Auto classes.
"""

from .checkpoint import save
from .elastic.loading import load
from .errors import InputError, PPFError
from .fitting import fit
from .grid import Grid
from .models import PPFLlamaConfig, PPFLlamaForCausalLM
from .policy import Policy
from .recovery import RecoverySettings, recover
from .run import Answer, Run, Settings
from .runtime import accelerate
from .structure import Structure

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
