"""Run a tool from any folder: ``python PATH/TO/tools NAME …`` is ``python -m tools.NAME …`` of this code base."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    """The tool that the first argument names, with the others; without one, the list."""
    names = sorted(
        path.stem
        for path in FOLDER.glob("*.py")
        if not path.stem.startswith("_") and '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    )
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print(
            f"usage: python {sys.argv[0]} NAME ... (--help explains it), with one of: {', '.join(names)}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    # Before whatever the folder of the call holds: its packages may have names of this code base's, such as datasets.
    sys.path[:] = [str(FOLDER.parent), *(entry for entry in sys.path if entry and Path(entry).resolve() != FOLDER)]
    del sys.argv[0]
    runpy.run_module(f"tools.{sys.argv[0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
