"""The one torch.library namespace of PPF: the file that implements an op defines its schema into ``LIBRARY``."""

import torch

LIBRARY = torch.library.Library("ppf", "DEF")
