"""What can go wrong with checkpoints, in words that say what to do."""

from __future__ import annotations

import errno

from stretto.errors import Fatal, Rejoin


class Fenced(Rejoin):
    """A newer generation has begun: this one may not save any more."""


class CheckpointFailed(Fatal):
    """A checkpoint could not be written, too often in a row or when training could not go on without it."""


class Conflict(CheckpointFailed):
    """Another job or run writes into the same folder."""


class Damaged(Exception):
    """A checkpoint is not what was written; the message says what is wrong."""


class Abandoned(Exception):
    """A save was given up on this rank's own word; nobody needs to hear of it."""


def reason_of(error: BaseException, url: str) -> str:
    """Why writing or reading there failed, and what to do about it."""
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left at {url} ({error}): make room, keep fewer checkpoints, or give another place"
    if code == errno.EFBIG:
        return f"a file at {url} became larger than this process may write ({error}): raise its limit (ulimit -f)"
    if isinstance(error, PermissionError) or code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission at {url} ({error}): let this user write there, or give another place"
    if isinstance(error, FileNotFoundError):
        return f"something at {url} has disappeared ({error}): does another process delete files there?"
    return f"{type(error).__name__} at {url}: {error}"
