"""The vault: what is sealed opens only with its key and where it belongs, and a bad key file stops the start."""

from __future__ import annotations

import base64
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nimhost.errors import HostError, StartError
from nimhost.host.vault import Vault


def test_what_is_sealed_opens_again_after_a_restart(tmp_path: Path) -> None:
    sealed = Vault.load(tmp_path / "key").seal("nvapi-ключ\n", "default/k")
    assert Vault.load(tmp_path / "key", [(sealed, "default/k")]).open(sealed, "default/k") == "nvapi-ключ\n"


def test_the_same_text_sealed_twice_looks_different_and_shows_nothing(tmp_path: Path) -> None:
    vault = Vault.load(tmp_path / "key")
    one, two = vault.seal("canary", "default/k"), vault.seal("canary", "default/k")
    assert one != two
    assert not set(one.split(".")[1:]) & set(two.split(".")[1:])
    assert "canary" not in one + repr(vault) + str(vars(vault))
    assert base64.b64encode(b"canary").decode().strip("=") not in one


def test_a_sealed_text_copied_to_another_name_does_not_open(tmp_path: Path) -> None:
    vault = Vault.load(tmp_path / "key")
    sealed = vault.seal("canary", "default/mine")
    with pytest.raises(HostError, match="cannot be opened") as caught:
        vault.open(sealed, "default/yours")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "v1", "v1.a.b", "v2.AAAA.AAAA", "v1..", "v1.ÄÖ.x"])
def test_a_text_that_was_never_sealed_is_an_error_with_a_way_out(tmp_path: Path, text: str) -> None:
    with pytest.raises(HostError) as caught:
        Vault.load(tmp_path / "key").open(text, "default/k")
    assert caught.value.hint == "Set it again: nimhost secrets update k --from-file -"


def test_one_changed_bit_is_noticed(tmp_path: Path) -> None:
    vault = Vault.load(tmp_path / "key")
    version, wrapped, value = vault.seal("canary", "default/k").split(".")
    raw = bytearray(base64.b64decode(value))
    raw[-1] ^= 1
    with pytest.raises(HostError):
        vault.open(".".join((version, wrapped, base64.b64encode(raw).decode())), "default/k")


@pytest.mark.fault(30)
def test_the_key_file_is_made_for_its_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Vault.load(tmp_path / "data" / "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "data" / "key").stat().st_mode) == 0o600
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["key"]


@pytest.mark.fault(30)
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_key_that_others_can_read_is_refused_at_the_start(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    Vault.load(path)
    path.chmod(mode)
    with pytest.raises(StartError, match="can be read by others") as caught:
        Vault.load(path)
    assert (caught.value.hint or "").startswith(f"chmod 600 {path}")


def test_a_key_that_is_gone_while_secrets_exist_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "key"
    sealed = Vault.load(path).seal("x", "default/k")
    path.unlink()
    with pytest.raises(StartError, match="is gone"):
        Vault.load(path, [(sealed, "default/k")])
    assert not path.exists()


def test_the_key_of_another_installation_is_refused_at_the_start(tmp_path: Path) -> None:
    sealed = Vault.load(tmp_path / "a").seal("x", "default/k")
    Vault.load(tmp_path / "b")
    with pytest.raises(StartError, match="the key of another one"):
        Vault.load(tmp_path / "b", [(sealed, "default/k")])


def test_one_damaged_secret_is_no_reason_to_call_the_key_a_wrong_one(tmp_path: Path) -> None:
    vault = Vault.load(tmp_path / "key")
    damaged, whole = (vault.seal("x", "default/other"), "default/damaged"), (vault.seal("y", "default/k"), "default/k")
    assert Vault.load(tmp_path / "key", [damaged, whole]).open(*whole) == "y"


@pytest.mark.fault(20)
def test_a_key_is_not_deleted_before_it_is_known_not_to_be_needed(tmp_path: Path) -> None:
    """Cut off after the transaction of a rotation; then somebody put another database there for a while."""
    path = tmp_path / "key"
    vault = Vault.load(path)
    old = vault.seal("x", "default/k")
    vault.write_next_key()
    new = vault.rewrap(old, "default/k")
    of_another = Vault(b"7" * 32).seal("x", "default/k")
    with pytest.raises(StartError, match="the key of another one"):
        Vault.load(path, [(of_another, "default/k")])
    damaged = (of_another, "default/damaged")
    assert Vault.load(path, [damaged, (new, "default/k")]).open(new, "default/k") == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("content", [b"", b"hello", base64.b64encode(b"short"), b"\xff" * 44])
def test_a_file_that_holds_no_key_is_refused_and_not_overwritten(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StartError, match="does not hold a key"):
        Vault.load(path)
    assert path.read_bytes() == content


def test_a_link_in_place_of_the_key_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StartError):
        Vault.load(tmp_path / "key")
    assert not (tmp_path / "elsewhere").exists()


def test_two_who_make_the_key_at_once_get_the_same_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        vaults = list(pool.map(lambda _: Vault.load(tmp_path / "key"), range(8)))
    sealed = vaults[0].seal("x", "default/k")
    assert {vault.open(sealed, "default/k") for vault in vaults} == {"x"}
    assert [p.name for p in tmp_path.iterdir()] == ["key"]
