"""A report on data as one HTML file: no script, no network, nothing outside it."""

import base64
import io
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mmpeft.data_check.pictures import source_of
from mmpeft.data_check.samples import KINDS as TOKENS
from mmpeft.data_check.samples import Sample
from mmpeft.data_check.scan import KINDS
from mmpeft.data_check.text import COLUMNS, figure_rows, of_kind, sample_head, shown, verdict
from mmpeft.images import load_frames, load_image
from mmpeft.retention.plots import svg

SIDE = 160  # largest side of a picture shown, in pixels


def render_page(report: dict, samples: list[Sample], figure) -> str:
    """The report ("mmpeft.data/1"), its rows drawn and its figure as an HTML document.

    Whatever comes from the data is escaped; pictures are shown small.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("mmpeft.data_check").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        report=report,
        verdict=verdict(report),
        kinds=[(kind, meaning, of_kind(report, kind)) for kind, meaning in KINDS.items()],
        columns=COLUMNS,
        figures=figure_rows(report),
        figure=None if figure is None else Markup(svg(figure)),
        tokens=TOKENS,
        samples=[
            (sample_head(sample), [(run.kind, shown(run, None)) for run in sample.runs],
             [small for part in sample.pictures for small in thumbnails(part)])
            for sample in samples
        ],
    )  # fmt: skip


def thumbnails(part: dict) -> list[str]:
    """The picture of a message part, or the frames of its clip, as small ``data:`` URLs."""
    source = source_of(part)
    loaded = [load_image(source)] if part["type"] == "image" else load_frames(source, 4)
    urls = []
    for picture in loaded:
        picture.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        urls.append(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return urls
