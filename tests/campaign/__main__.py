"""``python -m tests.campaign``: see the package's own words."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from pathlib import Path

from . import children, ground
from .attacks import ATTACKS
from .outcomes import Try, counted


def main() -> int:
    options = _options()
    children.with_shim()
    from . import runner

    start = time.monotonic()
    ground.prepare()
    with ground.made() as attacked:
        names = _names(options)
        if options.seed is not None:
            tries = [runner.made(attacked, *name) for name in names]
            print("\n".join(runner.shown(one) for one in tries), file=sys.stderr)
        else:
            tries = runner.made_by_several(attacked, names, options.processes)
    if options.tries:
        runner.write(options.tries, tries)
    return _concluded(options, tries, time.monotonic() - start)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a minute of it")
    parser.add_argument("--only", action="append", choices=ATTACKS, help="this attack; may be given again")
    parser.add_argument("--seed", type=int, help="this try of --only")
    parser.add_argument("--start", type=int, default=0, help="leave out the tries before this one")
    parser.add_argument("--count", type=int, help="so many tries of every attack")
    parser.add_argument("--share", type=float, default=1.0, help="so much of the long pass")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--tries", type=Path, metavar="FILE", help="write every try, one line of JSON each")
    parser.add_argument("--page", action="store_true", help="fill the table of docs/reliability.md and its JSON file")
    return parser.parse_args()


def _names(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Long tries first, so that no process is left with them alone."""
    chosen = {name: ATTACKS[name] for name in options.only or reversed(ATTACKS)}
    if options.seed is not None:
        return [(name, options.seed) for name in chosen]
    found = []
    for name, attack in chosen.items():
        count = options.count or (attack.short if options.short else math.ceil(options.share * attack.long))
        found += [(name, seed) for seed in range(options.start, options.start + count)]
    return found


def _concluded(options: argparse.Namespace, tries: list[Try], seconds: float) -> int:
    for attack, outcomes in counted(tries).items():
        print(f"{attack:<12}", ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items())))
    print(f"{len(tries):,} tries in {seconds:.0f} s")
    if options.page:
        from .page import fill

        fill(tries, seconds)
    return int(any(one.is_fault for one in tries))


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # others' farewells take seconds
