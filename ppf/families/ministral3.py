"""Ministral 3: Mistral whose queries grow with their position, beyond the length it was first trained on."""

from .base import Family

MINISTRAL3 = Family(
    "ministral3", "Ministral3", traits=frozenset({"position scale"}), towers={"mistral3": "model.language_model."}
)
