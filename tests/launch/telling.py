"""What the launcher tells a user who has made a mistake."""

from __future__ import annotations

import pytest

from sglang_sm120_launch import cli


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence a command line is refused with."""
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("sglang-sm120: ") and err.endswith(".\n"), err
    return err
