"""PEFT methods that peft lacks, on peft's own base classes; one file a method, found by being here.

Importing this package makes peft know them.
"""

import importlib
import pkgutil

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
for _config in PEFT_TYPE_TO_CONFIG_MAPPING.values():
    if _config.__module__.startswith(f"{__name__}."):
        globals()[_config.__name__] = _config
