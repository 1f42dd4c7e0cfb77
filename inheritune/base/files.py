"""Files and folders written so that a kill, a full disk or a power cut leaves the old one or the new, never a
half; and a lock on a folder."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from typing import IO

from inheritune.base.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    raise SystemExit("nanoInheritune runs on Linux and macOS; on Windows use WSL") from None

MAX_JSON = 50_000_000  # characters; our largest file has about 100 kB
LOCK = ".lock"  # in a locked folder: whose it is
# what CIFS, VirtualBox and WSL answer to fsync of a folder
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EIO)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Opens a temporary file beside `path`; at the end it is fsynced and renamed to `path`, and the folder is
    fsynced. After an exception the temporary file is gone and `path` is unchanged."""
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


def is_running(pid: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # somebody else's
    except (ProcessLookupError, OverflowError):
        return False
    return True


def refuse_existing(path: str) -> None:
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; choose another --out, or delete it first")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[str]:
    """Yields a temporary folder beside `path`, to be filled with files that are fsynced. At the end it is
    renamed to `path`, and the rename is on disk; after an exception it is removed. An existing `path` is
    refused."""
    path = os.fspath(path).rstrip("/")
    parent, name = os.path.dirname(path) or ".", os.path.basename(path)
    refuse_existing(path)
    os.makedirs(parent, exist_ok=True)
    prefix = os.path.join(parent, f".{name}.")
    for left in glob.glob(glob.escape(prefix) + "*.tmp"):
        pid = left.removeprefix(prefix).removesuffix(".tmp")
        if pid.isdecimal() and not is_running(int(pid)):  # it was killed
            with deleting(left):
                shutil.rmtree(left)
    temporary = f"{prefix}{os.getpid()}.tmp"
    try:
        os.mkdir(temporary)
        yield temporary
        os.rename(temporary, path)
        sync_folder(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def deleting(path: str | os.PathLike) -> Iterator[None]:
    """Within this context an OSError is only a line on stdout, because deleting what is old must never end a
    run. Another user's file may lie in it, or one that an NFS client still has open."""
    try:
        yield
    except OSError as e:
        print(f"{path} cannot be deleted ({e.strerror}); delete it yourself")


def sync_folder(folder: str | os.PathLike) -> None:
    """fsync of a folder, where the file system has it: names made in it survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in NO_SYNC:
            raise
    finally:
        os.close(fd)


def lock_folder(folder: str | os.PathLike) -> int | None:
    """Locks `folder` for this process. Returns what `unlock_folder` takes, or None if another process has it.

    The lock ends with the process, even by SIGKILL, and moves with the folder. What is locked is a file open
    for writing, because NFS and Lustre pass such locks on to other machines. Where the file system does not,
    the owner's name in the file helps: a second run on another machine prints a warning, and the first sees
    by `is_locked_by_us` that it has lost the folder.
    """
    path = os.path.join(folder, LOCK)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path))
    except (BlockingIOError, FileNotFoundError):  # locked, or just unlocked and deleted
        ours = False
    except OSError as e:
        print(f"{folder}: cannot be locked ({e.strerror}); make sure yourself that no other run uses it")
        ours = True
    if not ours:  # another process has it, or has unlocked it since we opened it
        os.close(fd)
        return None
    owner = os.read(fd, 1000).decode(errors="replace")
    if owner and not owner.startswith(f"{socket.gethostname()} "):
        print(f"{folder}: was locked by {owner}, and not unlocked; if that run goes on, stop one of the two")
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{whoami()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode(), 0)
    return fd


def is_locked_by_us(folder: str | os.PathLike) -> bool:
    """False if another process has since written its name into the lock of a folder of ours."""
    with contextlib.suppress(OSError), open(os.path.join(folder, LOCK), encoding="utf-8") as f:
        return f.read().startswith(f"{whoami()},")
    return True


def whoami() -> str:
    """`node7 process 4711`."""
    return f"{socket.gethostname()} process {os.getpid()}"


def unlock_folder(folder: str | os.PathLike, fd: int) -> None:
    """Gives up what `lock_folder` returned."""
    if is_locked_by_us(folder):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder, LOCK))
    os.close(fd)


def write_json(path: str | os.PathLike, value) -> None:
    """Writes `value` as indented JSON, atomically."""
    with replacing(path, "w") as f:
        f.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file; UserError if the file is missing, is not JSON, or holds no object."""
    if not os.path.isfile(path):  # opening a named pipe would wait for ever
        raise UserError(f"{path} {'is no regular file' if os.path.lexists(path) else 'does not exist'}")
    try:
        with open(path, encoding="utf-8-sig") as f:  # others put a byte order mark before it
            value = json.loads(f.read(MAX_JSON))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); it is damaged or not ours: make it again") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f"{path} holds a JSON {kind} where an object is expected; make it again")
    return value


def read_optional(folder: str, name: str) -> dict | None:
    """The object in a folder's JSON file, or None where there is no such file."""
    path = os.path.join(folder, name)
    return read_json(path) if os.path.exists(path) else None


def read_files(folder: str, names: Iterable[str]) -> dict[str, bytes]:
    """{name: bytes} of those of these files that a folder holds."""
    found = {}
    for name in names:
        if os.path.isfile(path := os.path.join(folder, name)):
            with open(path, "rb") as f:
                found[name] = f.read()
    return found


def sha256(path: str | os.PathLike) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
