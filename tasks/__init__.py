"""The tasks that ship with mmpeft: one file each, found by being here."""

if __name__ != "mmpeft.tasks":
    raise ImportError("import this package as mmpeft.tasks")

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
