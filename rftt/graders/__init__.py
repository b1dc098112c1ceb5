"""What judges a response. `build_prm` is the only place that knows which PRMs exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rftt.graders.prm import ProcessConfig, ProcessModel


def build_prm(cfg: ProcessConfig) -> ProcessModel | None:
    """The process reward model of a run; None without one."""
    if not cfg.use_prm:
        return None
    if cfg.prm_url is not None:
        from rftt.graders.prm import RemotePRM

        return RemotePRM(cfg)
    from rftt.graders.prm_local import LocalPRM

    return LocalPRM(cfg)


async def open_prm(cfg: ProcessConfig, warn: Callable[[str], None]) -> ProcessModel | None:
    """`build_prm`, for a script: it must answer, and rank an example, or `warn` hears of it."""
    from rftt.graders.prm import ranking_warning

    prm = build_prm(cfg)
    if prm and (warning := await ranking_warning(prm, cfg.prm_check_file)):
        warn(f"warning: {warning}")
    return prm
