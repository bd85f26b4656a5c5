"""SmolLM3: Llama in which some layers do not rotate queries and keys."""

from .base import Family

SMOLLM3 = Family("smollm3", "SmolLM3")
