"""The folder of built things: where it is, damage, other processes, other users."""

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fa3.launch import cache

ROOT = Path(__file__).parent.parent
VARIABLES = "FA3_CACHE", "FA3_CACHE_DIR", "XDG_CACHE_HOME"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def obtain(build=b"new", name="entry.zip") -> tuple[bytes, bool]:
    """(content, whether it was built)"""
    built = []
    content = cache.obtain(name, lambda: (built.append(1), build)[1])
    return content, bool(built)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"FA3_CACHE_DIR": "/some/where"}, Path("/some/where")),
        ({"FA3_CACHE_DIR": "~/c"}, Path.home() / "c"),
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/fa3")),
        ({}, Path.home() / ".cache" / "fa3"),
        ({"FA3_CACHE": "0", "FA3_CACHE_DIR": "/some/where"}, None),
    ],
)
def test_the_folder(environment, wanted, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache.folder() == wanted


def test_what_was_built_is_found_again(folder):
    assert obtain(b"first") == (b"first", True)
    assert obtain(b"second") == (b"first", False)
    assert obtain(b"other", "another.zip") == (b"other", True)


def test_the_disk_can_be_switched_off(folder, monkeypatch):
    monkeypatch.setenv("FA3_CACHE", "0")
    assert obtain() == obtain() == (b"new", True)
    assert not folder.exists()


@pytest.mark.parametrize("fact", ["kernel", "target", "machine"])
def test_every_fact_is_part_of_the_name(fact, monkeypatch):
    facts = {"kernel": "a", "target": "gpu"}
    before = cache.name_of(facts, ".zip")
    assert cache.name_of(dict(facts), ".zip") == before
    if fact == "machine":
        monkeypatch.setattr(cache, "machine", lambda: "another processor")
    else:
        facts[fact] += "b"
    assert cache.name_of(facts, ".zip") != before


@pytest.mark.parametrize("where", ["start", "middle", "end", "truncated", "empty"])
def test_a_damaged_entry_is_built_again(where, folder):
    obtain(bytes(1000))
    path = folder / "entry.zip"
    content = bytearray(path.read_bytes())
    place = {"start": 10, "middle": len(content) // 2, "end": len(content) - 5}.get(where)
    if place is not None:
        content[place] ^= 0x55
    path.write_bytes(content[: {"truncated": len(content) // 2, "empty": 0}.get(where, None)])
    with pytest.warns(UserWarning, match=r"entry.zip is not used: it is damaged .wrong checksum"):
        assert obtain() == (b"new", True)
    assert obtain() == (b"new", False)


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    """Only the cache is lost, with a warning."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot use the cache folder"):
        assert obtain() == (b"new", True)


def test_an_entry_that_cannot_be_written(folder):
    (folder / "entry.zip").mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot write the cache entry"):
        assert obtain() == (b"new", True)
    assert sorted(path.name for path in folder.iterdir()) == ["entry.lock", "entry.zip"]


@pytest.mark.parametrize(
    ("umask", "of_folder", "of_entry"),
    [(0o022, 0o755, 0o644), (0, 0o755, 0o644), (0o77, 0o700, 0o600)],
)
def test_other_users_may_read_and_not_write(umask, of_folder, of_entry, folder):
    before = os.umask(umask)
    try:
        obtain()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "entry.zip")]
    assert modes == [of_folder, of_entry]
    assert obtain() == (b"new", False)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_a_folder_that_others_may_write_to(mode, folder):
    """Nothing is read from it or written to it; the warning names the remedy, which helps."""
    obtain(b"planted")
    folder.chmod(mode)
    before = sorted(folder.iterdir())
    with pytest.warns(UserWarning, match=f"lets others write.*Remedy: chmod go-w {folder}, or let"):
        assert obtain() == (b"new", True)
    assert sorted(folder.iterdir()) == before
    folder.chmod(mode & ~0o22)
    assert obtain() == (b"planted", False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_the_folder_of_another_user(folder):
    obtain(b"planted")
    os.chown(folder, 12345, -1)
    with pytest.warns(UserWarning, match="belongs to user 12345, and this is user 0"):
        assert obtain() == (b"new", True)


def test_the_folder_of_root_is_trusted(folder, monkeypatch):
    obtain(b"of root")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    if folder.stat().st_uid == 0:
        assert obtain() == (b"of root", False)
    else:
        with pytest.warns(UserWarning, match="and this is user 12345"):
            assert obtain() == (b"new", True)


def test_an_entry_that_others_may_write_to(folder):
    """Of a folder that was open to others once."""
    obtain(b"planted")
    (folder / "entry.zip").chmod(0o666)
    with pytest.warns(UserWarning, match="entry.zip is not used: its mode .* lets others write"):
        assert obtain() == (b"new", True)
    assert obtain() == (b"new", False)


def test_a_lock_that_nobody_gives_back(folder, monkeypatch):
    """After a while the work is done without it."""
    fcntl = pytest.importorskip("fcntl", reason="this system has no advisory locks")
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.2)
    folder.mkdir(mode=0o755)
    with (folder / "entry.lock").open("a") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert obtain() == (b"new", True)
    assert obtain() == (b"new", False)


def test_a_forked_child_does_not_keep_the_lock(folder, monkeypatch):
    """It has a copy of the open file, and may live on for long."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    read, write = os.pipe()
    children = []

    def build():
        children.append(os.fork())
        if not children[0]:
            os.read(read, 1)
            os._exit(0)
        return b"new"

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch's threads
            cache.obtain("entry.zip", build)
        (folder / "entry.zip").unlink()
        code = (
            "from fa3.launch import cache; cache.LOCK_SECONDS = 60; "
            "cache.obtain('entry.zip', bytes)"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=50)
    finally:
        os.write(write, b"x")
        os.waitpid(children[0], 0)
