"""Errors that the command line reports in one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the caller can mend: a file that is no image, weights that do not fit, a senseless option."""
