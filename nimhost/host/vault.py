"""Secrets at rest: AES-256-GCM, a key per secret, each wrapped by the one in the key file.

A sealed text is `v1.<wrapped key>.<ciphertext>`, base64; each half is its nonce (12 bytes) and the ciphertext. Both are
bound to what they belong to (`workspace/name`): a sealed value copied to another row does not open there.
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

from nimhost.errors import HostError, StartError

KEY_BYTES = 32
_NONCE_BYTES = 12
_VERSION = "v1"


class Vault:
    def __init__(self, key: bytes) -> None:
        self._key = AESGCM(key)

    def __repr__(self) -> str:
        return "Vault(...)"

    @classmethod
    def load(cls, path: Path, sealed: Sequence[tuple[str, str]] = ()) -> Vault:
        """The vault of the key file at `path`, made when there is neither a file nor anything sealed.

        `sealed`: what the database holds, as (sealed text, what it is bound to); the key must open the first of them.
        Raises StartError for a key that is gone, readable by others, malformed, or not the one of this database.
        """
        if not path.exists() and not path.is_symlink():
            if sealed:
                raise StartError(
                    f"The key file {path} is gone, and the database holds {len(sealed)} secrets that only it opens.",
                    hint=f"Put the file back from a backup of {path.parent}, or move the database away as well.",
                )
            _create_key(path)
        vault = cls(_read_key(path))
        for text, bound_to in sealed[:1]:
            vault._prove(text, bound_to, path)
        return vault

    def seal(self, text: str, bound_to: str) -> str:
        """`text`, readable only with the key file and only for the same `bound_to`."""
        data_key = AESGCM.generate_key(bit_length=KEY_BYTES * 8)
        wrapped = _encrypt(self._key, data_key, bound_to)
        return ".".join((_VERSION, wrapped, _encrypt(AESGCM(data_key), text.encode(), bound_to)))

    def open(self, sealed: str, bound_to: str) -> str:
        """What was sealed. Raises HostError when the key, the binding or the text is not the one it was sealed with."""
        try:
            version, wrapped, value = sealed.split(".")
            if version != _VERSION:
                raise ValueError(f"unknown form {version}")
            data_key = _decrypt(self._key, wrapped, bound_to)
            return _decrypt(AESGCM(data_key), value, bound_to).decode()
        except (InvalidTag, ValueError, binascii.Error) as e:
            raise HostError(
                f"The stored value of '{bound_to}' cannot be opened: it is damaged or belongs to another key.",
                hint=f"Set it again: nimhost secrets update {bound_to.rpartition('/')[2]} --from-file -",
            ) from e

    def _prove(self, sealed: str, bound_to: str, path: Path) -> None:
        try:
            self.open(sealed, bound_to)
        except HostError as e:
            raise StartError(
                f"The key in {path} does not open the secrets in the database: it is the key of another one.",
                hint=f"Put the right key file back to {path}.",
            ) from e


def _encrypt(key: AESGCM, plain: bytes, bound_to: str) -> str:
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return base64.b64encode(nonce + key.encrypt(nonce, plain, bound_to.encode())).decode()


def _decrypt(key: AESGCM, text: str, bound_to: str) -> bytes:
    raw = base64.b64decode(text, validate=True)
    return key.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], bound_to.encode())


def _create_key(path: Path) -> None:
    """Written whole under another name first, then linked to `path`: there is never half a key, nor two."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o600)
            file.write(base64.b64encode(secrets.token_bytes(KEY_BYTES)) + b"\n")
            file.flush()
            os.fsync(fd)
        with suppress(FileExistsError):  # another process was first: its key counts
            os.link(draft, path)
        draft.unlink()
    except OSError as e:
        raise StartError(f"The key file {path} cannot be made: {e.strerror}.", hint="See the data directory.") from e


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
    return _parse_key(text, path)


def _parse_key(text: bytes, path: Path) -> bytes:
    with suppress(binascii.Error):
        if len(key := base64.b64decode(text.strip(), validate=True)) == KEY_BYTES:
            return key
    raise StartError(f"The key file {path} does not hold a key: 32 bytes in base64 are needed.", hint="Put it back.")
