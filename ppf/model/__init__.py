"""The Hugging Face classes of pruned models; importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import PPFLlamaConfig
from .layout import build, policy_of, pruned_config
from .modeling import PPFLlamaForCausalLM, PPFLlamaModel

AutoConfig.register(PPFLlamaConfig.model_type, PPFLlamaConfig, exist_ok=True)
AutoModel.register(PPFLlamaConfig, PPFLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(PPFLlamaConfig, PPFLlamaForCausalLM, exist_ok=True)

__all__ = ["PPFLlamaConfig", "PPFLlamaForCausalLM", "PPFLlamaModel", "build", "policy_of", "pruned_config"]
