"""What clients without a key can make the server log."""

from __future__ import annotations

import logging

import pytest

from branchwise.runtime.server.client_warnings import LOG_SECONDS, ClientWarnings


def test_a_warning_is_one_line_and_says_how_many_there_were(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    logger = logging.getLogger("test.client_warnings")
    logger.addFilter(ClientWarnings(lambda: now))
    for _ in range(1000):
        logger.warning("Invalid HTTP request received.")
        logger.warning("Unsupported upgrade request.")
    logger.error("a bug")
    logger.error("a bug")
    now = LOG_SECONDS
    logger.warning("Invalid HTTP request received.")
    logger.warning("Invalid HTTP request received.")
    assert [record.getMessage() for record in caplog.records] == [
        "Invalid HTTP request received.",
        "Unsupported upgrade request.",
        "a bug",
        "a bug",
        "Invalid HTTP request received. (999 more since the last such line)",
    ]
