"""What optipfair 0.4.2 makes of a model: FFN width by its data-driven score, and depth by its layer analysis.

    python3 -m venv VENV
    VENV/bin/pip install torch==2.13.0
    VENV/bin/pip install optipfair==0.4.2 transformers==5.24.0
    VENV/bin/python benchmarks/outside/run_optipfair.py MODEL CALIBRATION TEST --ppf .venv/bin/ppf \
        --output benchmarks/results/outside_optipfair_cpu.json

The calls are those of its README on PyPI ("The Pipeline") and of its docstrings: ``prune_model(pruning_type="MLP_GLU",
neuron_selection_method="MAW", dataloader=…)``, whose data loader switches the data-driven score on, and
``analyze_layer_importance`` before ``prune_model(pruning_type="DEPTH", layer_indices=…)``. Set up by hand: the data
loader, and the share of channels, which is the ratio asked over the FFN's part of the layers' parameters, since
optipfair leaves attention alone. Its second step, distillation, is left out: nothing here is trained.
"""

from __future__ import annotations

import logging

import common
import optipfair
from torch import nn
from torch.utils.data import DataLoader


def batches(case: common.Case) -> DataLoader:
    """One calibration sequence at a time."""
    return DataLoader([{"input_ids": row} for row in case.calibration], batch_size=1)


def width(model: nn.Module, case: common.Case) -> nn.Module:
    """The same share of the FFN channels of every layer."""
    percent = 100 * case.ratio / common.ffn_share(model)
    return optipfair.prune_model(
        model=model, pruning_type="MLP_GLU", neuron_selection_method="MAW", pruning_percentage=percent,
        dataloader=batches(case), show_progress=False,
    )  # fmt: skip


def depth(model: nn.Module, case: common.Case) -> nn.Module:
    """The layers that turn the residual stream least."""
    importance = optipfair.analyze_layer_importance(model, batches(case), show_progress=False)
    count = round(case.ratio * len(importance))
    least = sorted(importance, key=importance.__getitem__)[:count]
    return optipfair.prune_model(model=model, pruning_type="DEPTH", layer_indices=least, show_progress=False)


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.WARNING)
    common.measure(common.parser(__doc__).parse_args(), {"FFN width": width, "depth": depth}, ("optipfair",))
