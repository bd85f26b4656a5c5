"""The operators of PPF: schema, implementations and PyTorch reference of each stand in one file per family."""
