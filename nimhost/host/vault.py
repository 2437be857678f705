"""Secrets at rest: AES-256-GCM, a key per secret, each wrapped by the one in the key file.

A sealed text is `v1.<wrapped key>.<ciphertext>`, base64; each half is its nonce (12 bytes) and the ciphertext. Both are
bound to what they belong to (`workspace/name`): a sealed value copied to another row does not open there.

The key may come from the environment (NIMHOST_ENCRYPTION_KEY) instead of a file. A rotation writes the next key beside
the file (`key.new`), wraps every data key with it in one transaction of the store, then moves it over the old one: a
start finds out by what the database holds whether the transaction was committed.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nimhost.errors import Conflict, HostError, StartError

KEY_BYTES = 32
_NONCE_BYTES = 12
_VERSION = "v1"


class Vault:
    def __init__(self, key: bytes, path: Path | None = None) -> None:
        """`path`: of the key file; None for a key that is in none."""
        self._keys = [AESGCM(key)]
        self._path = path
        self._next: AESGCM | None = None
        self._unmoved = False
        """The key in use is still in `key.new`."""

    def __repr__(self) -> str:
        return "Vault(...)"

    @classmethod
    def load(cls, path: Path, sealed: Sequence[tuple[str, str]] = (), key: str | None = None) -> Vault:
        """The vault of the key file at `path`, made when there is neither a file nor anything sealed; or of `key`.

        `sealed`: what the database holds, as (sealed text, what it is bound to); the key must open one of them: the
        rest may be damaged.
        `key`: 32 bytes in base64, used instead of the file.
        Raises StartError for a key that is gone, readable by others, malformed, or not the one of this database.
        """
        if key is not None:
            vault = cls(_parse_key(key.encode(), "NIMHOST_ENCRYPTION_KEY"))
            vault._prove(sealed, "NIMHOST_ENCRYPTION_KEY")
            return vault
        _finish_rotation(path, sealed)
        if not path.exists() and not path.is_symlink():
            if sealed:
                raise StartError(
                    f"The key file {path} is gone, and the database holds {len(sealed)} secrets that only it opens.",
                    hint=f"Put the file back from a backup of {path.parent}, or move the database away as well.",
                )
            _create_key(path)
        vault = cls(_read_key(path), path)
        vault._prove(sealed, str(path))
        return vault

    def seal(self, text: str, bound_to: str) -> str:
        """`text`, readable only with the key file and only for the same `bound_to`."""
        data_key = AESGCM.generate_key(bit_length=KEY_BYTES * 8)
        wrapped = _encrypt(self._keys[0], data_key, bound_to)
        return ".".join((_VERSION, wrapped, _encrypt(AESGCM(data_key), text.encode(), bound_to)))

    def open(self, sealed: str, bound_to: str) -> str:
        """What was sealed. Raises HostError when the key, the binding or the text is not the one it was sealed with."""
        try:
            wrapped, value = _halves(sealed)
            return _decrypt(AESGCM(self._unwrap(wrapped, bound_to)), value, bound_to).decode()
        except (InvalidTag, ValueError, binascii.Error) as e:
            raise HostError(
                f"The stored value of '{bound_to}' cannot be opened: it is damaged or belongs to another key.",
                hint=f"Set it again: nimhost secrets update {bound_to.rpartition('/')[2]} --from-file -",
            ) from e

    def _opens_any(self, sealed: Sequence[tuple[str, str]]) -> bool:
        for text, bound_to in sealed:
            with suppress(HostError):
                self.open(text, bound_to)
                return True
        return False

    # --- rotation

    def write_next_key(self) -> None:
        """The first step: a new key beside the file, and on the disk. Blocks. Raises Conflict, HostError."""
        if self._path is None:
            raise Conflict(
                "The key comes from the environment (NIMHOST_ENCRYPTION_KEY): nimhost cannot change it there.",
                hint="For another key: read the values (nimhost secrets access), delete the secrets, start nimhost "
                "with the new key, or without one for a key file that can be rotated, and create them again.",
            )
        if self._unmoved:
            self._move()
        key = secrets.token_bytes(KEY_BYTES)
        try:
            _draft(self._path, key).replace(_next(self._path))
            _sync_directory(self._path.parent)
        except OSError as e:
            raise HostError(f"The new key cannot be written: {e.strerror}.", hint="See the data directory.") from e
        self._next = AESGCM(key)

    def rewrap(self, sealed: str, bound_to: str) -> str:
        """The same secret under the next key. Raises HostError as `open` does."""
        assert self._next is not None
        self.open(sealed, bound_to)  # what does not open now would be taken for lost later
        wrapped, value = _halves(sealed)
        return ".".join((_VERSION, _encrypt(self._next, self._unwrap(wrapped, bound_to), bound_to), value))

    def adopt_next_key(self) -> None:
        """The last step, when the database has every secret under the next key. What was read before still opens."""
        assert self._next is not None
        self._keys.insert(0, self._next)
        self._next, self._unmoved = None, True
        self._move()

    def _move(self) -> None:
        assert self._path is not None
        _move_next(self._path)
        self._unmoved = False

    def _unwrap(self, wrapped: str, bound_to: str) -> bytes:
        for key in self._keys[:-1]:
            with suppress(InvalidTag):
                return _decrypt(key, wrapped, bound_to)
        return _decrypt(self._keys[-1], wrapped, bound_to)

    def _prove(self, sealed: Sequence[tuple[str, str]], where: str) -> None:
        if sealed and not self._opens_any(sealed):
            raise StartError(
                f"The key in {where} does not open the secrets in the database: it is the key of another one.",
                hint="Put the right key back to where it was: the key file, or NIMHOST_ENCRYPTION_KEY.",
            )


def _halves(sealed: str) -> tuple[str, str]:
    version, wrapped, value = sealed.split(".")
    if version != _VERSION:
        raise ValueError(f"unknown form {version}")
    return wrapped, value


def _next(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _finish_rotation(path: Path, sealed: Sequence[tuple[str, str]]) -> None:
    """A key.new is left when a rotation was cut off: it is the key if it opens what the database holds. It goes away
    once the other one is known to be the key, and not before."""
    if not _next(path).exists():
        return
    if Vault(_read_key(_next(path)))._opens_any(sealed):
        _move_next(path)
    elif not sealed or (path.exists() and Vault(_read_key(path))._opens_any(sealed)):
        _next(path).unlink()


def _move_next(path: Path) -> None:
    try:
        _next(path).replace(path)
        _sync_directory(path.parent)
    except OSError as e:
        raise HostError(
            f"The new key {_next(path)} cannot be moved to {path}: {e.strerror}.",
            hint="It is in use, and the next start moves it: do not delete it.",
        ) from e


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _encrypt(key: AESGCM, plain: bytes, bound_to: str) -> str:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return base64.b64encode(nonce + key.encrypt(nonce, plain, bound_to.encode())).decode()


def _decrypt(key: AESGCM, text: str, bound_to: str) -> bytes:
    raw = base64.b64decode(text, validate=True)
    return key.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], bound_to.encode())


def _create_key(path: Path) -> None:
    """Written whole under another name first, then linked to `path`: there is never half a key, nor two."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = _draft(path, secrets.token_bytes(KEY_BYTES))
        with suppress(FileExistsError):  # another process was first: its key counts
            os.link(draft, path)
        draft.unlink()
        _sync_directory(path.parent)
    except OSError as e:
        raise StartError(f"The key file {path} cannot be made: {e.strerror}.", hint="See the data directory.") from e


def _draft(path: Path, key: bytes) -> Path:
    """A key in a file of its own beside `path`, on the disk."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, 0o600)
        file.write(base64.b64encode(key) + b"\n")
        file.flush()
        os.fsync(fd)
    return draft


def _read_key(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(fd, "rb") as file:
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
            text = file.read(1024)
    except OSError as e:
        raise StartError(f"The key file {path} cannot be read: {e.strerror}.", hint="See its owner and mode.") from e
    if mode & 0o077:
        raise StartError(
            f"The key file {path} can be read by others (mode {mode:04o}).",
            hint=f"chmod 600 {path}   (and change the secrets if others may have read it)",
        )
    return _parse_key(text, f"The key file {path}")


def _parse_key(text: bytes, where: str) -> bytes:
    with suppress(binascii.Error):
        if len(key := base64.b64decode(text.strip(), validate=True)) == KEY_BYTES:
            return key
    raise StartError(f"{where} does not hold a key: 32 bytes in base64 are needed.", hint="Put it back.")
