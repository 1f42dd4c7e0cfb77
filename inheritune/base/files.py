"""Files written so that a kill, a full disk or a power cut leaves the old one or the new, never a half."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from typing import IO

from inheritune.base.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    raise SystemExit("nanoInheritune runs on Linux and macOS; on Windows use WSL") from None

MAX_JSON = 50_000_000  # bytes; our largest, an index of weights and a list of shards, have about 100 kB


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Opens a temporary file beside `path`; at the end, on disk, it replaces `path` in one rename, which is
    on disk when this returns. After an exception the temporary file is gone and `path` is unchanged."""
    path = os.fspath(path)
    folder = os.path.dirname(path) or "."
    temporary = os.path.join(folder, f".{os.path.basename(path)}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def sync_folder(folder: str | os.PathLike) -> None:
    """fsync of a folder: names created or renamed in it survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock_folder(folder: str | os.PathLike) -> int | None:
    """A file descriptor that locks `folder`, or None if another process holds the lock. It lasts until the
    descriptor is closed, or the process ends, even by SIGKILL; also when the folder is renamed."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError as e:  # a file system without locks
        print(f"{folder}: cannot be locked ({e.strerror}); make sure yourself that no other run uses it")
    return fd


def write_json(path: str | os.PathLike, value) -> None:
    """Writes `value` as indented JSON, atomically."""
    with replacing(path, "w") as f:
        f.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file; UserError if the file is missing, too large, not JSON, or holds none."""
    if not os.path.isfile(path):  # opening a named pipe would wait for ever
        raise UserError(f"{path} {'is no regular file' if os.path.lexists(path) else 'does not exist'}")
    if (size := os.path.getsize(path)) > MAX_JSON:
        raise UserError(f"{path} has {size:,} bytes, too many for one of ours (at most {MAX_JSON:,})")
    try:
        with open(path, encoding="utf-8-sig") as f:  # others put a byte order mark before it
            value = json.load(f)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); it is damaged or not ours: make it again") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f"{path} holds a JSON {kind} where an object is expected; make it again")
    return value


def sha256(path: str | os.PathLike) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
