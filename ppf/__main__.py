"""``python -m ppf`` is ``ppf``: for ``torchrun … -m ppf``, and for processes that know only their interpreter."""

from .cli import main

main()
