"""The docs' diagram and table are what the code says. `make traces` rewrites them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stretto_controller.core.transitions import diagram, table

PROTOCOL = Path(__file__).parent.parent / "docs" / "protocol.md"


def _filled(text: str) -> str:
    for name, content in {"phases": f"```mermaid\n{diagram()}\n```", "table": table()}.items():
        pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.S)  # type: ignore[misc]
        assert count == 1, f"docs/protocol.md has no place for the generated {name}"
    return text


def test_protocol_page_shows_the_table_of_the_code() -> None:
    text = PROTOCOL.read_text()
    if os.environ.get("STRETTO_REWRITE_TRACES"):
        PROTOCOL.write_text(_filled(text))
        text = PROTOCOL.read_text()
    assert text == _filled(text), "docs/protocol.md is out of date; run `make traces`"
