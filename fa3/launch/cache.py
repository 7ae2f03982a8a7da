"""What a process built, kept on disk for later ones: kernels, the emulator's stand-in runtime.

    FA3_CACHE_DIR   the folder, default $XDG_CACHE_HOME/fa3 or ~/.cache/fa3
    FA3_CACHE=0     nothing is kept

An entry is 32 bytes with the SHA-256 of the content that follows. It is written under another name
and renamed into place; one that fails its checksum is deleted and built again. All users may read
it. As its content becomes code of this process, nothing is read that another user could have put
there: neither from a folder that others may write to, nor a file of theirs.

Imports the standard library alone, so that the emulator may import it.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import secrets
import stat
import time
import warnings
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # no advisory locks on this system: processes may build the same thing twice
    fcntl = None

DIGEST = hashlib.sha256().digest_size
LOCK_SECONDS = 120.0  # a compilation takes a few seconds


def folder() -> Path | None:
    """Where the entries lie, by the environment; None when the disk is not to be used."""
    if os.environ.get("FA3_CACHE", "1") == "0":
        return None
    if path := os.environ.get("FA3_CACHE_DIR"):
        return Path(path).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fa3"


def name_of(facts: dict, suffix: str) -> str:
    """The name of the entry that was built of these facts on a machine like this one."""
    facts = {**facts, "machine": machine()}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{digest[:40]}{suffix}"


@functools.cache
def machine() -> str:
    """Entries hold host code that was generated for this processor."""
    cpu = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {cpu}"


def obtain(name: str, build: Callable[[], bytes]) -> bytes:
    """The content of an entry: from the disk if possible, else built and put there."""
    place = _usable_folder()
    if place is None:
        return build()
    path = place / name
    content = _read(path)
    if content is None:
        with _lock(path.with_suffix(".lock")):
            content = _read(path)  # another process may have been quicker
            if content is None:
                content = build()
                _write(path, content)
    return content


def holds(name: str) -> bool:
    """Whether there is such an entry, undamaged."""
    place = _usable_folder()
    return place is not None and _read(place / name) is not None


def why_not() -> str:
    """Why nothing is kept on disk; "" if the folder, which is made if need be, will do."""
    place = folder()
    if place is None:
        return "FA3_CACHE is 0"
    try:
        place.mkdir(mode=0o755, parents=True, exist_ok=True)
        others = _others(place.stat())
    except OSError as error:
        return f"cannot use the cache folder {place}: {error}"
    if others:
        return (
            f"the cache folder {place} is not used, as code from it could be another user's: "
            f"{others}. What this process compiles is kept for itself. Remedy: chmod go-w {place}, "
            "or let FA3_CACHE_DIR name a folder that only you may write to"
        )
    return ""


def _usable_folder() -> Path | None:
    """The folder; None if there is to be none or it will not do."""
    place = folder()
    if place is not None and (why := why_not()):
        warnings.warn(why, stacklevel=3)
        return None
    return place


def _others(status: os.stat_result) -> str:
    """Why others than this user and root may write to a file or folder; "" if they may not."""
    if not hasattr(os, "geteuid"):
        return ""
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {status.st_uid}, and this is user {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"its mode {stat.filemode(status.st_mode)} lets others write to it"
    return ""


def _read(path: Path) -> bytes | None:
    """The content of an entry, or None if there is none or it is no good; then it is deleted."""
    try:
        with path.open("rb") as file:
            why = _others(os.fstat(file.fileno()))
            entry = file.read()
    except OSError:
        return None
    if not why and hashlib.sha256(entry[DIGEST:]).digest() == entry[:DIGEST]:
        return entry[DIGEST:]
    why = why or "it is damaged (wrong checksum)"
    warnings.warn(f"cache entry {path} is not used: {why}; compiling again", stacklevel=3)
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def _write(path: Path, content: bytes) -> None:
    """Put an entry in place as a whole; a disk that refuses costs only the cache."""
    fresh = path.with_name(f".{path.stem}.{secrets.token_hex(8)}")
    try:
        number = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with open(number, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(fresh, path)
    except OSError as error:
        warnings.warn(f"cannot write the cache entry {path}: {error}", stacklevel=3)
        with contextlib.suppress(OSError):
            fresh.unlink()


@contextlib.contextmanager
def _lock(path: Path):
    """Held by the process that builds.

    Without it, or when it cannot be had in time, the work is done twice and nothing breaks.
    """
    try:
        handle = path.open("a")
    except OSError:
        yield
        return
    with handle:
        deadline = time.monotonic() + LOCK_SECONDS
        while fcntl is not None and time.monotonic() < deadline:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        try:
            yield
        finally:
            if fcntl is not None:  # closing does not give it back where a forked child has a copy
                with contextlib.suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_UN)
