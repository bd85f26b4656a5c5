"""OLMo 2: norms only after the sub-layers. Its query and key norms run over all heads together, so that a head that
goes would change the others: attention goes as a whole or not at all, channels one by one."""

from dataclasses import replace

from .base import ATTENTION, FFN, Family

OLMO2 = Family(
    "olmo2",
    "Olmo2",
    attention=replace(ATTENTION, before=None, after="post_attention_layernorm", whole=True),
    ffn=replace(FFN, before=None, after="post_feedforward_layernorm"),
    traits=frozenset({"joint head norm"}),
)
