"""The ``vllm.general_plugins`` entry point: vLLM calls :func:`register` in every process it starts.

vLLM reads per-layer head counts off a heterogeneous configuration of transformers itself (from 0.32 on, on which this
is tested: ``make test-serve``). What it lacks is a model whose layers take their own widths: all that we register.
"""

from __future__ import annotations

from ...errors import PPFError

# Named, not imported: importing a model class may initialise CUDA, and vLLM forks afterwards.
MODEL_CLASS = "ppf.deliver.export.vllm_model:PPFLlamaForCausalLM"
SERVED = "ppf_llama", "ppf_mistral", "ppf_qwen2"
"""Model types of results with different widths that the plugin serves; of those before the second, without a window."""


def register() -> None:
    """Make vLLM know results of PPF by the architectures that their configurations name.

    Raises ``PPFError`` for a vLLM that does not read configurations whose layers differ.
    """
    from vllm import ModelRegistry
    from vllm.config.model_arch import ModelArchitectureConfig

    from ...model.classes import classes_of

    if not hasattr(ModelArchitectureConfig, "from_layers"):
        raise PPFError("this vLLM does not read configurations whose layers differ: install vLLM 0.32 or later")
    for model_type in SERVED:
        architecture = classes_of(model_type)["ForCausalLM"].__name__
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, MODEL_CLASS)
