"""Triton kernels, one file per family. Imported as ``ppf.kernels``; importing this package needs no Triton."""
