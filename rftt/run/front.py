"""The front of a script: `--help` and config errors are answered before torch is imported."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NoReturn

from rftt.run.cli import cli


def front(script: str, schema: type) -> NoReturn:
    """Read the config of a script that was started by name, then import it and run its `main`."""

    def main(cfg: Any) -> None:
        import_module(script).main(cfg)

    cli(main, schema)
    raise SystemExit(0)
