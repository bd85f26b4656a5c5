"""Configuration of a Nemotron-NAS (DeciLM) checkpoint: Llama's fields and one block of options a layer.

Written by PPF beside the weights, for readers that have a DeciLM model but take its configuration from the checkpoint.
"""

from transformers import LlamaConfig


class Block(dict):
    """A JSON object whose fields are attributes too, which is how models read them."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """``block_configs[i]`` has ``attention`` (no_op, n_heads_in_group) and ``ffn`` (no_op, ffn_mult) of layer i."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **fields):
        super().__init__(**fields)
        blocks = block_configs or []
        self.block_configs = [Block({name: Block(part) for name, part in block.items()}) for block in blocks]
