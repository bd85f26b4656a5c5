"""``python -m ppf.cli``: the same as ``ppf``, for processes that know only their interpreter."""

from . import main

main()
