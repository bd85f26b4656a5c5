"""What amd-quark 0.13 makes of a model: OSSCAR, FFN channels with its correction of the weights that stay.

    python3 -m venv VENV
    VENV/bin/pip install torch==2.13.0
    VENV/bin/pip install amd-quark==0.13 transformers==5.24.0
    VENV/bin/python benchmarks/outside/run_amd_quark.py MODEL CALIBRATION TEST --ppf .venv/bin/ppf \
        --output benchmarks/results/outside_amd-quark_cpu.json --ratio 0.2

The calls are those of its page "LLM Pruning" (``ModelPruner(PConfig(algo_config=OSSCARConfig(...)))``), the fields
those of its own test of OSSCAR. Set up by hand: the fields, whose files the page has and the package has not; a data
loader; and ``inside_layer_modules``, which that test fills with all seven projections, so that every layer computes the
calibration text eight times: only ``mlp.down_proj`` is pruned, which named alone gives the same in two passes. The
share of channels is the ratio asked over the FFN's part of the layers' parameters; OSSCAR rounds widths to multiples of
128, hence ratios a little off what was asked. Its second step, blockwise tuning, is left out: nothing here is trained.
"""

from __future__ import annotations

import common
from quark.torch import ModelPruner
from quark.torch.pruning.config import OSSCARConfig, PConfig
from torch import nn
from torch.utils.data import DataLoader


def osscar(model: nn.Module, case: common.Case) -> nn.Module:
    """The same share of the FFN channels of every layer."""
    config = OSSCARConfig(
        inside_layer_modules=["mlp.down_proj"], mlp_pruning_modules=["mlp.down_proj"],
        mlp_scaling_layers={"mlp.down_proj": ["mlp.up_proj", "mlp.gate_proj"]},
        mlp_pruning_ratio=case.ratio / common.ffn_share(model), mlp_intermediate_size_name="intermediate_size",
        model_decoder_layers="model.layers",
    )  # fmt: skip
    batches = DataLoader(case.calibration.to(case.device), batch_size=1)
    return ModelPruner(PConfig(algo_config=config)).pruning_model(model, batches).to(case.device)


if __name__ == "__main__":
    common.measure(common.parser(__doc__).parse_args(), {"OSSCAR": osscar}, ("amd-quark",))
