"""An error in place of a result."""

from __future__ import annotations

import traceback


def noted(error: Exception) -> dict[str, str]:
    """What the results keep of an error; all of it is printed."""
    traceback.print_exception(error)
    return {"error": f"{type(error).__name__}: {error}"[:500]}
