"""Commands that tests need beside Python. A test that lacks one fails: a skipped one would look like a passed one."""

from __future__ import annotations

import shutil


def installed(command: str) -> str:
    """The path of a command that `make test` installs."""
    path = shutil.which(command)
    assert path is not None, f"{command} is not installed; `make test` installs it (tools/debian_packages.sh)"
    return path
