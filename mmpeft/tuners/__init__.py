"""PEFT methods that peft lacks, on peft's own base classes; one file a method, found by being here.

Importing this package makes peft know them.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
