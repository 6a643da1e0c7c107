"""The networks: every timm name, the CIFAR networks of the literature beside them, and the weights of both.

Importing this package registers the CIFAR networks with timm (`timm.list_models("cifar_*")`). Each module of the
package is imported here, so a new network is one new file.
"""

from __future__ import annotations

import importlib
import pkgutil

from vkd.models.creation import (
    check_arch,
    count_macs,
    count_parameters,
    create_model,
    input_normalization,
    pretrained_image_size,
)
from vkd.models.intermediates import FeatureShapes, Intermediates
from vkd.models.weights import load_into, load_weights, save_weights, weights_sha256

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "FeatureShapes",
    "Intermediates",
    "check_arch",
    "count_macs",
    "count_parameters",
    "create_model",
    "input_normalization",
    "load_into",
    "load_weights",
    "pretrained_image_size",
    "save_weights",
    "weights_sha256",
]
