"""The one torch.library namespace of PPF: every op's schema is defined into ``LIBRARY`` by the file that implements it."""

import torch

LIBRARY = torch.library.Library("ppf", "DEF")
