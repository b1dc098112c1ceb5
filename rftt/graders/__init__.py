"""Judge responses. Only `build_prm` refers to the implementations of process reward models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rftt.graders.prm import ProcessConfig, ProcessModel


def build_prm(cfg: ProcessConfig) -> ProcessModel | None:
    """Build the process reward model of a run. Return None if the run does not use one."""
    if not cfg.use_prm:
        return None
    if cfg.prm_url is not None:
        from rftt.graders.prm import RemotePRM

        return RemotePRM(cfg)
    from rftt.graders.prm_local import LocalPRM

    return LocalPRM(cfg)


async def open_prm(cfg: ProcessConfig, warn: Callable[[str], None]) -> ProcessModel | None:
    """Build the process reward model and check that it ranks an example correctly.

    A wrong order is reported through `warn`. Raises UserError if the model cannot score at all.
    """
    from rftt.graders.prm import ranking_warning

    prm = build_prm(cfg)
    if prm and (warning := await ranking_warning(prm, cfg.prm_check_file)):
        warn(f"warning: {warning}")
    return prm
