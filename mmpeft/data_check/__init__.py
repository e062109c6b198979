"""``mmpeft data check``: every row of a data set, before anything trains on it."""

from mmpeft.data_check.report import check_data, write
from mmpeft.data_check.text import render

__all__ = ["check_data", "render", "write"]
