"""``ppf demo``: the whole path on the bundled model, checked from outside.

Every result is reloaded in a new process and scored on a part of the text that the fit never saw. The uniform policy
gets the same ranking, the same refit and the same treatment: only the policy differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..errors import InputError, PPFError
from .console import progress_bars, show
from .options import Json

if TYPE_CHECKING:
    from ..fitting.session import Session
    from ..progress import Progress

DATA = Path(__file__).resolve().parents[1] / "data"
_MODEL, _TEXT = DATA / "tiny-2m", DATA / "sample.txt"
_RATIOS = (0.2, 0.3, 0.5)
_HELD_OUT_SHARE = 0.2
_SEQUENCE_LENGTH = 512


def demo(
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep run and checkpoints here.")] = None,
    evaluations: Annotated[int, typer.Option(help="Policies that the fit measures.")] = 120,
    as_json: Json = False,
) -> None:
    """Fit the bundled 1.8M-parameter Llama, prune it at 20, 30 and 50 %, reload each result, compare. CPU, minutes."""
    start = time.perf_counter()
    with ExitStack() as stack:
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ppf-demo-")))
        if output is not None:
            _require_new(output)
        progress = stack.enter_context(progress_bars())
        fitting, held_out = _split_text(folder)
        session = _fit(fitting, folder / "run", evaluations, progress)
        data = _compare(session, folder, held_out, progress)
    fit_seconds = session.run.manifest["seconds"]
    data |= {"fit_seconds": fit_seconds, "seconds": time.perf_counter() - start, "evaluations": evaluations}
    show(as_json, data, _table(data), _explanation(data, output))


def _require_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("output", folder, "exists and is not empty", "Name a new folder")


def _split_text(folder: Path) -> tuple[Path, Path]:
    """Two files in ``folder``: what is fitted on, and the last fifth of the text, which nothing but the end sees."""
    from ..files import write_text

    text = _TEXT.read_text(encoding="utf-8")
    cut = text.index("\n", int(len(text) * (1 - _HELD_OUT_SHARE))) + 1
    folder.mkdir(parents=True, exist_ok=True)
    fitting, held_out = folder / "fit.txt", folder / "held-out.txt"
    write_text(fitting, text[:cut])
    write_text(held_out, text[cut:])
    return fitting, held_out


def _fit(text: Path, output: Path, evaluations: int, progress: Progress) -> Session:
    from ..fitting.run import Settings
    from ..fitting.session import Session
    from ..fitting.stages import fit

    settings = Settings(evaluations=evaluations, sequence_length=_SEQUENCE_LENGTH, evaluation_tokens=8192)
    return Session(fit(_MODEL, text, output, settings=settings, device="cpu", progress=progress), "cpu")


def _compare(session: Session, folder: Path, held_out: Path, progress: Progress) -> dict[str, Any]:
    """Write every result, score each in a process of its own (two at a time), and put the figures side by side."""
    results = {
        (ratio, name): folder / f"{name}-{round(100 * ratio)}" for ratio in _RATIOS for name in ("uniform", "ppf")
    }
    with ThreadPoolExecutor(max_workers=2) as pool:
        dense = pool.submit(_in_new_process, _MODEL, held_out)
        facts, scores = {}, {}
        for key, output in results.items():
            facts[key] = _deliver(session, *key, output)
            scores[key] = pool.submit(_in_new_process, output, held_out)
        for done, score in enumerate(as_completed([dense, *scores.values()]), start=1):
            score.result()
            progress("demo", done, 1 + len(scores))
    sides = {key: facts[key] | {"held_out": scores[key].result()} for key in results}
    rows = [{"requested_ratio": r, "uniform": sides[r, "uniform"], "ppf": sides[r, "ppf"]} for r in _RATIOS]
    return {"dense": dense.result(), "rows": rows}


def _deliver(session: Session, ratio: float, name: str, output: Path) -> dict[str, Any]:
    """Choose one policy, write its checkpoint, and return what is worth telling."""
    from ..choose.budget import RatioBudget
    from ..choose.candidates.sampling import uniform_policy
    from ..deliver.results import Choice, choose, deliver

    start, grid = time.perf_counter(), session.run.grid
    uniform = name == "uniform"
    choice = Choice(uniform_policy(grid, ratio), name, RatioBudget(grid, ratio)) if uniform else choose(session, ratio)
    report = deliver(session, choice, output)
    told = ("delivered_ratio", "policy", "parameters", "predicted", "measured")
    return {field: report[field] for field in told} | {"seconds": time.perf_counter() - start}


def _in_new_process(model: Path, text: Path) -> dict[str, Any]:
    """What ``ppf eval --json`` says about ``model`` in a process that knows nothing but its folder."""
    command = [sys.executable, "-m", "ppf", "eval", str(model), "--text", str(text), "--device", "cpu", "--json"]
    command += ["--sequence-length", str(_SEQUENCE_LENGTH)]
    # Two of them run side by side, so each gets one thread.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise PPFError(f"{' '.join(command)} failed with code {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def _table(data: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Perplexity of tiny-2m, pruned", title_justify="left")
    titles = "asked", "removed", "dense", "uniform", "PPF", "PPF on\nfit's text", "predicted\nfor it", "seconds"
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in data["rows"]:
        ppf, guess = row["ppf"], row["ppf"]["predicted"]
        table.add_row(
            f"{row['requested_ratio']:.0%}",
            f"{ppf['parameters']['dense'] - ppf['parameters']['pruned']:,}",
            f"{data['dense']['perplexity']:.2f}",
            f"{row['uniform']['held_out']['perplexity']:.2f}",
            f"{ppf['held_out']['perplexity']:.2f}",
            f"{ppf['measured']['perplexity']:.2f}",
            f"{guess['perplexity']:.2f} ±{guess['perplexity'] * guess['log_perplexity_std']:.2f}",
            f"{ppf['seconds']:.1f}",
        )
    return table


def _explanation(data: dict[str, Any], output: Path | None) -> str:
    held_out, split = (part["protocol"] for part in (data["dense"], data["rows"][0]["ppf"]["measured"]))
    delivered = ", ".join(f"{row['ppf']['delivered_ratio']:.1%}" for row in data["rows"])
    lines = (
        f"Removed: parameters; shares of the decoder layers' are {delivered}.",
        f"Text: ppf/data/sample.txt, sampled from a 14M Llama, in sequences of {_SEQUENCE_LENGTH} tokens.",
        f"Dense, uniform, PPF: on the text's last fifth, {held_out['tokens']:,} tokens, never fitted on, by",
        "`ppf eval` in a new process. Uniform: the same share of every sub-layer, with the same ranking and refit.",
        f"Fit's text: {split['tokens']:,} tokens of the rest, where policies were measured and are predicted.",
        f"Seconds: agent, materialise, score, write. The fit of {data['evaluations']} evaluations took "
        f"{data['fit_seconds']:.0f} s, everything {data['seconds']:.0f} s.",
        f"Run and checkpoints: {output}" if output else "Run and checkpoints were temporary; keep them with --output.",
    )
    return "\n".join(lines)
