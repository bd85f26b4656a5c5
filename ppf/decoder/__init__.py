"""The decoder on plain tensors: its weights, its arithmetic, and what one pass over text says of them."""
