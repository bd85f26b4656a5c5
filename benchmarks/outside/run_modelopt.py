"""What nvidia-modelopt 0.47 makes of a model without Megatron: FastNAS over FFN widths.

    python3 -m venv VENV
    VENV/bin/pip install torch==2.13.0
    VENV/bin/pip install nvidia-modelopt==0.47.0 transformers==5.24.0 requests
    VENV/bin/pip install --no-deps torchprofile==0.0.4
    VENV/bin/python benchmarks/outside/run_modelopt.py MODEL CALIBRATION TEST --ppf .venv/bin/ppf \
        --output benchmarks/results/outside_nvidia-modelopt_cpu.json --ratio 0.2

The call is that of its guide on pruning, ``mtp.prune(mode="fastnas", constraints={"params": ...})``. That guide
recommends Minitron and Puzzletron for language models, which want Megatron, and FastNAS for images. Set up by hand:
``requests`` and an old ``torchprofile``, which it needs and does not install (with 0.1.0 of that it fails); the score,
minus the perplexity of one calibration sequence, which is asked for every width of every layer, hence only four widths
a layer. It cannot trace the attention of transformers 5.24, so FFNs are all that it finds. Its limit counts tied
embeddings twice and is given in that count. Widths differ from layer to layer and the configuration has one, so what
``save_pretrained`` writes does not open again: the perplexity is that of the model in memory.
"""

from __future__ import annotations

import common
import modelopt.torch.prune as mtp
from torch import nn

_SCORED_SEQUENCES, _WIDTHS = 1, 4


def as_it_counts(model: nn.Module) -> int:
    """Parameters, those that two modules share counted twice."""
    return sum(p.numel() for module in model.modules() for p in module.parameters(recurse=False))


def fastnas(model: nn.Module, case: common.Case) -> nn.Module:
    """FFN widths that differ from layer to layer."""
    text = case.calibration[:_SCORED_SEQUENCES]
    goal = as_it_counts(model) - case.ratio * common.decoder_parameters(model)
    config, channels = mtp.fastnas.FastNASConfig(), model.config.intermediate_size
    widths = tuple((index + 1) / _WIDTHS for index in range(_WIDTHS))
    config["nn.Linear"]["*"] |= {"feature_divisor": channels // _WIDTHS, "features_ratio": widths}
    found, _ = mtp.prune(
        model, mode=[("fastnas", config)], constraints={"params": goal}, dummy_input=case.calibration[:1, :8],
        config={"data_loader": [text], "score_func": lambda m: -common.perplexity(m, text), "verbose": True},
    )  # fmt: skip
    return found


if __name__ == "__main__":
    common.measure(common.parser(__doc__).parse_args(), {"FastNAS": fastnas}, ("nvidia-modelopt",))
