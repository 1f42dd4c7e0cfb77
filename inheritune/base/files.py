"""Writing files so that a kill, a full disk or a power cut leaves either the old file or the new one, never half."""

import contextlib
import fcntl
import hashlib
import json
import os

from inheritune.base.errors import UserError

MAX_JSON = 50_000_000  # bytes; the largest of ours, a model's index or a data folder's list of shards, has some 100 kB


def sync_folder(folder):
    """fsync a folder, so that the names just created or renamed in it outlive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock_folder(folder):
    """A file descriptor that holds `folder` for this process until it is closed or the process is gone, however it
    went; None when another holds it. The folder may be moved meanwhile."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError as e:  # a file system without locks: nothing to be done about it
        print(f"{folder}: cannot be locked ({e.strerror}); see to it yourself that no other run uses it")
    return fd


@contextlib.contextmanager
def replacing(path, mode="wb"):
    """Open a temporary neighbour of `path` for writing; on success it takes the place of `path` in one rename.

    The data is on disk before the rename, and the rename before this returns. On an exception the temporary file
    is removed and `path` is as it was.
    """
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


def write_json(path, value):
    """Write `value` to `path` as indented JSON, atomically."""
    with replacing(path, "w") as f:
        f.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path):
    """The object in a JSON file. Raises UserError when it is missing, absurdly large, not JSON, or not an object."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"{path} {'is no regular file' if os.path.lexists(path) else 'does not exist'}")
    if os.path.getsize(path) > MAX_JSON:
        raise UserError(f"{path} has {os.path.getsize(path):,} bytes, too many for one of ours (at most {MAX_JSON:,})")
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); it is damaged or not ours: make it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__} where an object is expected; make it again")
    return value


def sha256(path):
    """Hex sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
