"""What torch-pruning 1.6.1 makes of a model: FFN channels by its Taylor and by its magnitude score.

    python3 -m venv VENV
    VENV/bin/pip install torch==2.13.0
    VENV/bin/pip install torch-pruning==1.6.1 transformers==5.24.0
    VENV/bin/python benchmarks/outside/run_torch_pruning.py MODEL CALIBRATION TEST --ppf .venv/bin/ppf \
        --output benchmarks/results/outside_torch-pruning_cpu.json

The calls are those of its README ("High-level Pruners", a backward pass before ``GroupTaylorImportance``) and of its
examples/LLMs/prune_llm.py (``MetaPruner``, ``global_pruning=False``, the configuration set afterwards). Set up by hand:
that example prunes heads and the hidden size by magnitude, and its own readme reports perplexities from 8,479 upwards
for that; here all but gate, up and down is left alone (``ignored_layers``), the share of channels is the ratio asked
over the FFN's part of the layers' parameters, and gradients are summed over eight calibration sequences. The model's
cache is switched off before it is traced (``'tuple' object has no attribute 'grad_fn'`` otherwise), and what the
example calls ``GroupNormImportance`` is ``GroupMagnitudeImportance`` in this version.
"""

from __future__ import annotations

import common
import torch_pruning
from torch import nn

_GRADIENT_SEQUENCES = 8


def pruned(model: nn.Module, case: common.Case, importance: torch_pruning.importance.Importance) -> nn.Module:
    """Every layer loses the same share of its FFN channels, by ``importance``."""
    kept_whole = [m for name, m in model.named_modules() if not name.endswith(("gate_proj", "up_proj"))]
    model.config.use_cache = False  # a cache among the outputs is more than it can trace
    pruner = torch_pruning.pruner.MetaPruner(
        model, example_inputs=case.calibration[:1, :8].to(case.device), importance=importance, global_pruning=False,
        pruning_ratio=case.ratio / common.ffn_share(model), ignored_layers=[m for m in kept_whole if is_layer(m)],
    )  # fmt: skip
    pruner.step()
    model.zero_grad(set_to_none=True)
    model.config.use_cache = True
    model.config.intermediate_size = model.get_decoder().layers[0].mlp.gate_proj.out_features
    return model


def is_layer(module: nn.Module) -> bool:
    """Whether it has parameters of its own."""
    return any(True for _ in module.parameters(recurse=False))


def taylor(model: nn.Module, case: common.Case) -> nn.Module:
    """By weight times gradient of the loss."""
    for row in case.calibration[:_GRADIENT_SEQUENCES].to(case.device).split(1):
        model(input_ids=row, labels=row, use_cache=False).loss.backward()
    return pruned(model, case, torch_pruning.importance.GroupTaylorImportance())


def magnitude(model: nn.Module, case: common.Case) -> nn.Module:
    """By the norm of the weights, as in the example for language models."""
    return pruned(model, case, torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"))


if __name__ == "__main__":
    methods = {"FFN width, Taylor": taylor, "FFN width, magnitude": magnitude}
    common.measure(common.parser(__doc__).parse_args(), methods, ("torch-pruning",))
