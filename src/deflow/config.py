"""The configuration's folder, what its YAML files may call, and its plain values."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from deflow.run_folder import new_run_folder
from deflow.tables import CONFIG_DIR

__all__ = ["CONFIG_DIR", "plain", "times"]


def times(factor: float, count: Any) -> Any:
    """`${times:1.5,${updates}}` in a YAML file; what is no number is left to the check of the settings."""
    return round(factor * count) if isinstance(count, int | float) else count


OmegaConf.register_new_resolver("run_folder", new_run_folder, use_cache=True, replace=True)
OmegaConf.register_new_resolver("times", times, replace=True)


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, loadable without OmegaConf."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
