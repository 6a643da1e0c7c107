"""How a student is taught: one file a method. Importing this package registers every method in it."""

import importlib
import pkgutil

from vkd.methods.combination import Combination, make_method
from vkd.methods.contract import METHODS, Batch, Method, MethodContext, Output, Progress

for _module in pkgutil.iter_modules(__path__, __name__ + "."):
    importlib.import_module(_module.name)

__all__ = ["METHODS", "Batch", "Combination", "Method", "MethodContext", "Output", "Progress", "make_method"]
