"""What tests need beside Python's own. `make test`, and so CI, brings it: there a test that lacks it fails.

Who calls pytest by hand on a machine without it has those tests skipped, and is told so.
"""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType
from typing import NoReturn

import pytest

# Set by the Makefile.
COMPLETE_VARIABLE = "STRETTO_TESTS_COMPLETE"


def installed(command: str) -> str:
    """The path of a command that `make test` installs."""
    path = shutil.which(command)
    if path is None:
        lacking(f"{command} is not installed; `make test` installs it as root (tools/debian_packages.sh)")
    return path


def imported(module: str) -> ModuleType:
    """A module of the extra `dev`. For the top of a test module, all of whose tests need it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        lacking(f"{module} cannot be imported ({error}); `make test` installs it, as does pip install -e '.[dev]'")


def lacking(what: str) -> NoReturn:
    """The test cannot run on this machine: it fails where everything was to be there, and is skipped elsewhere."""
    if os.environ.get(COMPLETE_VARIABLE):
        pytest.fail(what, pytrace=False)
    pytest.skip(what, allow_module_level=True)
