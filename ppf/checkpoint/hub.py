"""Models of a hub, through huggingface_hub: its cache, its offline mode, its tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import InputError
from ..storage.files import write_errors_named
from ..timings import timed

# Weights and what describes them and the tokenizer. Never code, and no other formats of the same weights.
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
# The same model once more for other readers: Mistral's own layout; ONNX, adapters and the like in folders.
UNWANTED = ["consolidated*.safetensors", "*/*.safetensors", "*/*.json"]
_LOGIN = "run `hf auth login`, or set HF_TOKEN"


@timed("fetching")
def fetch(name: str, revision: str | None) -> tuple[Path, str]:
    """The folder of repository ``name`` at ``revision`` (a branch, tag or commit; None: the main branch) in the hub's
    cache, filled as far as it is not, and the commit.

    Raises ``InputError`` if the hub cannot be reached and the cache has not all of it, if there is no such repository
    or revision, if one must log in or ask for access, and if it holds no safetensors.
    """
    said = name if revision is None else f"{name}@{revision}"
    if try_to_load_from_cache(name, "config.json", revision=revision) is None and not constants.HF_HUB_OFFLINE:
        warnings.warn(f"ppf: asking {constants.ENDPOINT} for {said}; what it sends is kept", stacklevel=2)
    try:
        with write_errors_named(Path(constants.HF_HUB_CACHE)):
            found = snapshot_download(name, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise _refused(said, error) from None
    folder = Path(found)
    if not any(folder.glob("*.safetensors")):
        raise _no_weights(said, name, folder)
    return folder, folder.name  # snapshots lie under the name of their commit


def _refused(said: str, error: Exception) -> InputError:
    """What huggingface_hub says in paragraphs, in one line."""
    hub, seen = constants.ENDPOINT, list(_causes(error))
    status = next((e.response.status_code for e in seen if isinstance(e, HfHubHTTPError) and e.response), None)
    if isinstance(error, RevisionNotFoundError):
        remedy = "Name a branch, a tag or a commit behind the @, or leave it out"
        return InputError("model", said, f"{hub} has the model, but not this revision", remedy)
    if any(isinstance(e, GatedRepoError) for e in seen) or status == 403:
        problem = f"{hub} gives it only to those who were granted access"
        return InputError("model", said, problem, f"Ask for access on its page, then {_LOGIN}")
    if any(isinstance(e, RepositoryNotFoundError) for e in seen):
        problem = f"is no folder here, and {hub} has no such model, or none that you may see"
        return InputError("model", said, problem, f"Check the name; if it is private, {_LOGIN}")
    if status == 401:
        return InputError("model", said, f"{hub} does not accept your token", f"To log in, {_LOGIN}")
    if isinstance(error, HFValidationError):
        problem = f"is no folder here, and no name of a model ({' '.join(str(error).split())})"
        return InputError("model", said, problem, "Name a folder, or a model as org/name")
    if constants.HF_HUB_OFFLINE:
        problem = f"is no folder here, and {constants.HF_HUB_CACHE} does not hold all of it, with HF_HUB_OFFLINE set"
        return InputError("model", said, problem, "Get it once without HF_HUB_OFFLINE, or name a folder")
    reason = f"HTTP {status}" if status else type(seen[-1]).__name__
    problem = f"is no folder here, and {hub} cannot be reached ({reason}), nor is all of it in the cache"
    return InputError("model", said, problem, "Check the network and HF_ENDPOINT, or name a folder")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _no_weights(said: str, name: str, folder: Path) -> InputError:
    remedy = "Name a repository with model.safetensors"
    try:
        files = HfApi().list_repo_files(name, revision=folder.name)
    except (HfHubHTTPError, OSError, RuntimeError):  # offline: then it stays unsaid what else there is
        files = []
    kinds = {file.rsplit(".", 1)[-1] for file in files}
    if "adapter_config.json" in files or (folder / "adapter_config.json").is_file():
        return InputError("model", said, "is an adapter, not a model", "Merge it into its base model first")
    if "gguf" in kinds:
        remedy = f"Get one with `hf download {name} FILE.gguf --local-dir .` and name that file"
        return InputError("model", said, "holds GGUF files only", remedy)
    if kinds & {"bin", "pt", "pth"}:
        remedy = "Open it in transformers, save_pretrained(FOLDER), and name that folder"
        return InputError("model", said, "holds pickled weights only, which PPF does not open", remedy)
    return InputError("model", said, "holds no safetensors", remedy)
