"""pytest puts the folders of test modules on the path: what stands in them may not hide what others import."""

from __future__ import annotations

import sys
from importlib.metadata import packages_distributions
from pathlib import Path

TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"


def test_no_module_hides_one_of_another_name() -> None:
    """tests/simulation/statistics.py did: torch.compile failed where that folder came before the standard library."""
    folders = {path.parent for path in TESTS.rglob("*.py") if path.name.startswith("test_") or path.stem == "conftest"}
    found = {path for folder in folders | {BENCHMARKS} for path in folder.iterdir() if path.suffix == ".py"}
    taken = sys.stdlib_module_names | packages_distributions().keys()
    assert not {path for path in found if path.stem in taken - {"conftest", "__main__"}}
    measured = {path.stem for path in BENCHMARKS.iterdir()}
    assert not {path for path in found if path.parent != BENCHMARKS and path.stem in measured}
