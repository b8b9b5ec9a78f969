"""What the controller logs, as text for people or as JSON for programs: one line per decision whose reason is new."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

CONSOLE, JSON = "console", "json"
FORMATS = (CONSOLE, JSON)
# What a line about a decision carries beside its text.
FIELDS = ("job", "generation", "phase", "reason")


def set_up(form: str) -> None:
    """Log to stderr from now on, in one of FORMATS."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if form == JSON else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and FIELDS where they are known."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
