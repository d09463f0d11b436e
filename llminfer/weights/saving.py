"""Writing a directory whole or not at all: a process that is killed, or a full disk, leaves what was there before."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from llminfer.errors import UserError, refuse

# What libraries that write say of a full disk, a quota, and a limit of the process; they raise errors of their own.
FULL = re.compile(r"no space left|file too large|quota exceeded|os error (27|28|122)\b", re.IGNORECASE)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)


@contextlib.contextmanager
def replacing(directory: Path, need: int = 0) -> Iterator[Path]:
    """A new directory to write into, which becomes `directory` when the block ends, in place of the one that is there.

    It is a hidden sibling, so on the same disk. When the block fails it is removed; what a killed process left is removed by the
    next one. need: bytes that will be written. Raises UserError: no place for them, another process writes there, no permission."""
    target = directory.expanduser().resolve()
    temporary = target.with_name(f".{target.name}.writing")
    if target.exists() and not target.is_dir():
        raise refuse("directory", str(directory), "is a file; must be a directory, or not be there yet")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(temporary, target):
            try:
                _clear(temporary)
                if _aside(target).exists() and not target.exists():
                    _aside(target).rename(target)
                free = shutil.disk_usage(temporary).free
                if need > free:
                    raise UserError(f"{directory}: {need / 1e9:.2f} GB are to be written, the disk has {free / 1e9:.2f} GB free")
                yield temporary
                _sync(temporary)
                _swap(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)  # after the swap: what was there before
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not FULL.search(str(error)):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else FULL.search(str(error))
        reason = reason if isinstance(reason, str) else reason[0] if reason else str(error)
        raise UserError(f"{directory}: cannot be written ({reason}); what was there is unchanged") from None


@contextlib.contextmanager
def _locked(temporary: Path, target: Path) -> Iterator[None]:
    """Makes `temporary` and holds a lock on it, which ends with the process, however it ends."""
    temporary.mkdir(exist_ok=True)
    handle = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = os.fstat(handle).st_ino != temporary.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            busy = True
        except OSError as error:  # file systems without locks: two writers at once are the user's to avoid
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.ENOSYS):
                raise
            busy = False
        if busy:
            raise refuse("directory", str(target), "another process is writing it")
        yield
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(folder: Path) -> None:
    """Without this a power cut could leave whole-looking files of zeros under the final name."""
    for parent, _, names in os.walk(folder, topdown=False):
        for path in (*(os.path.join(parent, name) for name in names), parent):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _swap(temporary: Path, target: Path) -> None:
    """Gives `temporary` the name of `target`; what was there is then under the temporary name, or gone."""
    if not target.exists():
        temporary.rename(target)
        return
    if not _exchange(temporary, target):
        # No such call, or a file system that has none: for a moment between two renames nothing has the name.
        old = _aside(target)
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _exchange(one: Path, other: Path) -> bool:
    """Lets two paths change their names in one step, where the system can; False where it cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(other))
