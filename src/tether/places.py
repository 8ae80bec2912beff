"""Where tether keeps what is its own on a machine. Knows nothing of what lies there."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where tether keeps what it fetched or built: $TETHER_CACHE, else $XDG_CACHE_HOME/tether, else ~/.cache/tether."""
    if own := os.environ.get("TETHER_CACHE"):
        return Path(own).expanduser()
    # The XDG specification: an empty or relative value counts as unset.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "tether"
