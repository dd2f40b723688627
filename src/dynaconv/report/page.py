"""One HTML page from a template: everything it needs is inside it, plotly.js included, once and compressed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from dynaconv import _checks
from dynaconv.report.gallery import Gallery, compress, pack

TEMPLATES = Path(__file__).parent / "templates"


@functools.lru_cache(maxsize=1)
def plotly_bundle() -> str:
    """plotly.js, gzip + base64 (2.0 MB instead of 4.8)."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise _checks.report_missing_package(error.name) from None
    return compress(get_plotlyjs().encode("utf-8"))


def render(template: str, *, charts: dict, gallery: Gallery | None = None, **context: Any) -> str:
    """Fill ``templates/template``; every string is escaped, JSON included.

    Args:
        template: file name under templates/.
        charts: chart specs by name (see charts.py); without any, plotly.js is left out.
        gallery: packed into the page when it holds pictures.
        context: further names the template uses.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise _checks.report_missing_package(error.name) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    # NaN is not JSON; failing here beats a page that cannot be parsed.
    environment.policies["json.dumps_kwargs"] = {
        "allow_nan": False,
        "ensure_ascii": False,
        "separators": (",", ":"),
    }
    meta, arrays = pack(gallery) if gallery is not None and len(gallery) else (None, "")
    return environment.get_template(template).render(
        charts={name: chart for name, chart in charts.items() if chart},
        gallery=meta,
        arrays=arrays,
        answers=gallery is not None and bool((gallery.labels >= 0).any()),
        boxes=gallery is not None and any(gallery.box(k) for k in range(len(gallery))),
        plotly=plotly_bundle() if any(charts.values()) else "",
        **context,
    )
