"""The model: geometry, policies, and transformers classes with widths of their own in every layer."""
