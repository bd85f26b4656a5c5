"""Llama 1 to 3 and everything published as one: the plain pre-norm decoder that the other families vary."""

from .base import Family

LLAMA = Family("llama", "Llama", uniform=("mistral",))
