"""Mistral: Llama with a sliding window, and any number of heads."""

from .base import Family

MISTRAL = Family("mistral", "Mistral")
