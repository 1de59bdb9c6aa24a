"""The one error a user meets: something about what they gave or have is wrong, and one sentence says what to do."""

from __future__ import annotations


class LaunchError(Exception):
    """A user error. Its message is one sentence: what was found, what was needed, what to do. The CLI exits with 2."""
