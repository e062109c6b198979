"""Many runs in one table: methods, ranks, shares of the data and seeds, each cell its own process.

A grid is a recipe and what varies in it (:mod:`.grid`). A cell trains, scores and measures
retention (:mod:`.cell`); :mod:`.run` starts those that are missing, :mod:`.table` pools the seeds,
:mod:`.figures` draws the front.
"""

from mmpeft.compare.run import compare, redraw
from mmpeft.compare.table import render

__all__ = ["compare", "redraw", "render"]
