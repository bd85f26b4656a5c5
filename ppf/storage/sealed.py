"""Sealed files: each carries the checksum of its own bytes, so that a flipped bit is found before it is believed.

The seal is part of the file, which is written under another name and renamed once it is complete: there is no moment at
which a file stands without its checksum, or a checksum without its file, whoever is killed. It is the XXH3-128 of whose
file it is, of its name there, and of all its bytes, those of the seal counted as zeros. So a file of another run, or
one under another's name, is found as well.

A seal has its place at the beginning: the first field of a JSON object, or of a safetensors file's metadata.
"""

from __future__ import annotations

import copy
import io
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import xxhash

from ..errors import InputError
from ..timings import timed
from .checksums import checksum
from .files import write_atomically
from .schemas import convert_to, parse_as, require_file

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

SEAL = "checksum"
"""The field that holds it."""
_ZEROS = "0" * 32
# Where it stands: behind so many bytes, and these.
_FORMS = ((0, f'{{\n  "{SEAL}": "'.encode()), (8, f'{{"__metadata__":{{"{SEAL}":"'.encode()))
_HEAD = 256
_BLOCK = 4 << 20
# More than any file of settings holds, and little enough to be read at once.
_LARGEST_JSON = 1 << 28
# A file system's clock ticks every few milliseconds: of a file written just now, a later change might not show.
_SETTLED = 2_000_000_000
# What was found before in this process: a file that is the same is not read again only to be checked.
_known: dict[tuple[object, ...], str] = {}


class Sealed:
    """The sealed files in ``folder``, which belong to ``owner``: a text that tells this one's from others'.

    ``expected`` are seals known from elsewhere, by name: a file with another one is refused, however sound it is.
    ``field`` and ``remedy`` are what errors say. Names are relative to the folder, with slashes.
    """

    def __init__(
        self, folder: Path, owner: str, field: str, remedy: str, expected: Mapping[str, str] | None = None
    ):  # fmt: skip
        self.folder, self.owner, self.expected = folder, owner, expected or {}
        self._field, self._remedy = field, remedy

    @timed("writing")
    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write ``data`` as indented JSON, atomically. Raises ``ValueError`` for NaN and infinities."""
        sealed = {SEAL: _ZEROS} | {field: value for field, value in data.items() if field != SEAL}
        text = json.dumps(sealed, indent=2, allow_nan=False) + "\n"
        self._write(name, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @timed("writing")
    def write_safetensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write ``tensors`` (copied to the CPU, made contiguous), atomically."""
        from safetensors.torch import save_file

        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self._write(name, lambda temporary: save_file(held, temporary, metadata={SEAL: _ZEROS}))

    def read_json(self, name: str, schema: type[T] | Any) -> T:
        """What a file holds, as ``schema``. Raises ``InputError`` as :meth:`require` does, and for what does not fit
        the schema."""
        data = self._opened(name, lambda stream: self._settings(name, stream))
        self._verify(name, io.BytesIO(data))  # what was checked is what is parsed
        said, text = (self._field, self.folder / name), data.decode("utf-8", "replace")
        found = parse_as(dict[str, Any], *said, text, self._remedy)
        return convert_to(schema, *said, {key: value for key, value in found.items() if key != SEAL}, self._remedy)

    def tensors(self, name: str, device: str = "cpu") -> dict[str, Tensor]:
        """The tensors of a file, memory-mapped on the CPU. Raises ``InputError`` as :meth:`require` does."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self.require(name)
        try:
            return load_file(self.folder / name, device=device)
        except (OSError, SafetensorError) as error:  # sealed, but not as safetensors
            raise self.damaged(name, f"cannot be read ({' '.join(str(error).split())})") from None

    @timed("checking")
    def require(self, name: str) -> str:
        """The seal of a file, checked once a process against all of its bytes.

        Raises ``InputError`` naming the file if it is missing, may not be read, or is not as it was sealed.
        """
        found = self._opened(name, lambda stream: self._known_or_verified(name, stream))
        if self.expected.get(name, found) != found:
            raise self._mismatch(name)
        return found

    def seal(self, name: str) -> str:
        """What a file says its checksum is. Raises as :meth:`require` does, without reading all of it."""
        return self._opened(name, lambda stream: self._place(name, stream)[1])

    def exists(self, name: str) -> bool:
        """Whether there is such a file; True as well for one that is known to have been there, and is to be missed."""
        return name in self.expected or (self.folder / name).exists()

    def damaged(self, name: str, problem: str) -> InputError:
        """The error about a file."""
        return InputError(self._field, self.folder / name, problem, self._remedy)

    def telling(self, remedy: str) -> Sealed:
        """The same files, with another remedy for what is wrong with them."""
        other = copy.copy(self)
        other._remedy = remedy
        return other

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        def writer(temporary: Path) -> None:
            write(temporary)
            with temporary.open("r+b") as stream:
                at, _ = self._place(name, stream)
                found = self._digest(name, stream, at)
                stream.seek(at)
                stream.write(found.encode())

        write_atomically(self.folder / name, writer)

    def _opened(self, name: str, read: Callable[[IO[bytes]], T]) -> T:
        """What ``read`` makes of the file; what the system refuses, as one line."""
        require_file(self._field, self.folder / name, self._remedy)
        try:
            with (self.folder / name).open("rb") as stream:
                return read(stream)
        except FileNotFoundError:
            raise self.damaged(name, "is missing") from None
        except PermissionError:
            remedy = "Ask whoever owns it for permission to read it"
            raise InputError(self._field, self.folder / name, "may not be read (permission denied)", remedy) from None
        except OSError as error:
            raise self.damaged(name, f"cannot be read ({error.strerror or error})") from None

    def _settings(self, name: str, stream: IO[bytes]) -> bytes:
        """All of a file that is not too large."""
        if os.fstat(stream.fileno()).st_size > _LARGEST_JSON:
            raise self.damaged(name, f"has more than {_LARGEST_JSON:,} bytes")
        return stream.read()

    def _known_or_verified(self, name: str, stream: IO[bytes]) -> str:
        state = os.fstat(stream.fileno())
        times = state.st_mtime_ns, state.st_ctime_ns
        key = self.owner, name, str(self.folder.absolute()), state.st_ino, state.st_size, times
        if key not in _known:
            found = self._verify(name, stream)
            if abs(time.time_ns() - max(times)) < _SETTLED:
                return found
            _known[key] = found
        return _known[key]

    def _verify(self, name: str, stream: IO[bytes]) -> str:
        """The seal, if the bytes of ``stream`` are those that were sealed."""
        at, found = self._place(name, stream)
        if self._digest(name, stream, at) != found:
            raise self._mismatch(name)
        return found

    def _place(self, name: str, stream: IO[bytes]) -> tuple[int, str]:
        """Where the seal stands, and what it is."""
        stream.seek(0)
        head = stream.read(_HEAD)
        for skipped, form in _FORMS:
            at = skipped + len(form)
            found = head[at : at + len(_ZEROS)]
            if head[skipped:at] == form and len(found) == len(_ZEROS):
                return at, found.decode("latin-1")
        raise self.damaged(name, "has no checksum in its place: it is damaged" if head else "is empty")

    def _digest(self, name: str, stream: IO[bytes], at: int) -> str:
        state = xxhash.xxh3_128(checksum(self.owner, name).encode())
        stream.seek(0)
        state.update(stream.read(at) + _ZEROS.encode())
        stream.seek(at + len(_ZEROS))
        while block := stream.read(_BLOCK):
            state.update(block)
        return state.hexdigest()

    def _mismatch(self, name: str) -> InputError:
        return self.damaged(name, "does not match its checksum: it is damaged, or belongs elsewhere")
