"""Start a script quickly: `--help` and configuration errors need no import of torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NoReturn

from rftt.run.cli import cli


def front(script: str, schema: type) -> NoReturn:
    """Read the configuration of a script, then import the script and run its `main`.

    The script itself calls this before its own imports, which take seconds.
    """

    def main(cfg: Any) -> None:
        import_module(script).main(cfg)

    cli(main, schema)
    raise SystemExit(0)
