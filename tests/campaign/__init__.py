"""The campaign: what strangers' files, full disks, killed processes and two commands at once can do to PPF.

    python -m tests.campaign                          # all of it, under an hour on two cores: `make campaign`
    python -m tests.campaign --short                  # a minute of it, which tests/campaign/test_short.py runs
    python -m tests.campaign --only kills --seed 123  # one try again

One file is one kind of attack; a number names a try of it, from which everything that is random follows. What is
promised stands in docs/reliability.md.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).parent.absolute()
# The tests' own helpers (factories.py), whoever starts the campaign.
if str(FOLDER.parent) not in sys.path:
    sys.path.insert(0, str(FOLDER.parent))
