"""The networks: every timm name, the CIFAR networks of the literature beside them, and the weights of both.

Importing this package registers the CIFAR networks with timm (`timm.list_models("cifar_*")`). Each module of the
package is imported here, so a new network is one new file.
"""

from __future__ import annotations

import importlib
import pkgutil

from vkd.models.creation import check_arch, count_parameters, create_model, input_normalization
from vkd.models.weights import load_into, load_weights, save_weights, weights_sha256

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "check_arch",
    "count_parameters",
    "create_model",
    "input_normalization",
    "load_into",
    "load_weights",
    "save_weights",
    "weights_sha256",
]
