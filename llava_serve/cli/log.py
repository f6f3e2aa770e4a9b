"""The log of a server in this process."""

from __future__ import annotations

import json
import logging

_STANDARD = vars(logging.makeLogRecord({})).keys() | {"message", "asctime", "taskName"}
"""What every record has; the others are its own fields."""


class JsonFormatter(logging.Formatter):
    """A JSON object a line: when, how serious, what, and a record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line | {name: value for name, value in vars(record).items() if name not in _STANDARD})


def log_to_stderr(form: str) -> None:
    """Writes the library's log to standard error from now on, as `text` or `json`."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    logger = logging.getLogger("llava_serve")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
