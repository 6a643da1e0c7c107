"""The engines that vkd's cluster launchers start jobs through, and what is to be installed for each."""

from __future__ import annotations

import importlib.util

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from vkd.errors import ConfigError

ENGINES = {
    "RayLauncher": ("ray", {"ray": "ray", "hydra_plugins.hydra_ray_launcher": "hydra-ray-launcher"}),
    "SlurmLauncher": (
        "slurm",
        {"submitit": "submitit", "hydra_plugins.hydra_submitit_launcher": "hydra-submitit-launcher"},
    ),
}
"""A launcher's class -> (the extra of vkd that installs its engine, the packages by their modules)."""


def require_engine(target: str) -> None:
    """Refuse a launcher whose engine is not installed, without importing it.

    Args:
        target: the launcher's `_target_`; others than vkd's cluster launchers need nothing.

    Raises ConfigError, which says what to install.
    """
    module, _, name = target.rpartition(".")
    if not module.startswith("hydra_plugins.vkd_launchers.") or name not in ENGINES:
        return
    extra, packages = ENGINES[name]
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"hydra/launcher={extra} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed",
            expected=f"the packages of vkd's extra {extra!r}",
            hint=f"pip install 'vkd[{extra}]'",
        )


def name_launchers() -> None:
    """Let `hydra/launcher=ray` mean vkd's own, in this process.

    hydra-ray-launcher stores a config of that name for every Hydra application of the environment; Hydra would check
    vkd's against it, refuse its keys, and warn of a deprecated feature.
    """
    Plugins.instance()  # now, since this is when plug-ins store their configs
    ConfigStore.instance().repo.get("hydra", {}).get("launcher", {}).pop("ray.yaml", None)
