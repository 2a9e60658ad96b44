"""The package's loggers: a message may quote a name or a value from somebody else's folder, so its control characters are escaped."""

from __future__ import annotations

import logging

from andromeda.utils.untrusted import printable


class _Printable(logging.Filter):
    """Replaces the message of a record by its text as a terminal may show it, before any handler sees it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        return True


def get_logger(name: str = "andromeda") -> logging.Logger:
    """`logging.getLogger`, with messages that are safe to print. Every module of the package takes its logger from here."""
    logger = logging.getLogger(name)
    if not any(isinstance(known, _Printable) for known in logger.filters):
        logger.addFilter(_Printable())
    return logger
