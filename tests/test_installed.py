"""A tool that is missing fails the tests of `make test`, and skips those of who calls pytest by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.outcomes import Failed, Skipped
from harness.installed import COMPLETE_VARIABLE, imported, installed


@pytest.mark.parametrize(("complete", "outcome"), [("1", Failed), ("", Skipped)], ids=["make test", "by hand"])
def test_says_what_is_missing_and_how_to_get_it(
    complete: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COMPLETE_VARIABLE, complete)
    with pytest.raises(outcome, match=r"no-such-tool is not installed; `make test` installs it"):
        installed("no-such-tool")
    with pytest.raises(outcome, match=r"no_such_module cannot be imported .*pip install -e '.\[dev\]'"):
        imported("no_such_module")


def test_make_has_all_tests_run_and_tells_of_those_that_are_skipped() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    runs = [line for line in makefile.splitlines() if "-m pytest -m 'not soak'" in line or "-m pytest -m soak" in line]
    assert len(runs) == 2
    assert all(f"{COMPLETE_VARIABLE}=1" in line and " -rs" in line for line in runs)
