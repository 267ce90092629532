"""The log of a server's process: lines of text, or JSON objects (``--log-format json``)."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import msgspec

from ..config import ServerConfig
from .log_stream import DroppingStream

FIELDS = "fields"  # of a record's ``extra``: a dict whose items become keys of its JSON object


class JsonFormatter(logging.Formatter):
    """Keys: ``time`` (ISO 8601, UTC), ``level``, ``process`` (http, tokenizer, scheduler, detokenizer), ``logger``,
    ``message``, ``exception`` (a traceback, if there is one), and the record's own fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        made: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            made["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(made | getattr(record, FIELDS, {})).decode()


def configure_logging(config: ServerConfig, process: str) -> DroppingStream:
    """Sends this process's log records and Python warnings to standard error, without ever blocking on it.

    Returns the stream, for other output of the process.
    """
    lines = formatter(config.log_format, process)

    def dropped(count: int) -> str:
        message = f"{count} lines of the log were dropped: they were not read in time"
        return lines.format(logging.makeLogRecord({"name": __name__, "levelname": "WARNING", "msg": message})) + "\n"

    stream = DroppingStream(2, dropped=dropped)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(lines)
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    return stream


def formatter(kind: str, process: str) -> logging.Formatter:
    """``kind``: text or json. ``process``: whose log it is."""
    if kind == "json":
        return JsonFormatter(process)
    return logging.Formatter(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")
