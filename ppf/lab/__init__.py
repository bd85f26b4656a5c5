"""Beside PPF itself: other people's methods, how far a run's predictor can be trusted, and pages. The extra ``lab``."""

from importlib.util import find_spec

from ..errors import InputError

# Said once, here, and not by whichever module comes to need them first.
_missing = [name for name in ("matplotlib", "scipy") if find_spec(name) is None]
if _missing:
    raise InputError(
        "ppf.lab", ", ".join(_missing), "is not installed, and lab tools need it", "Run: pip install 'ppf[lab]'"
    )
