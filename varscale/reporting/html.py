"""A report as one HTML page that refers to nothing outside itself."""

import base64

from jinja2 import Environment, PackageLoader, StrictUndefined

from varscale.reporting.content import Report


def to_html(report: Report) -> str:
    """The page; all text is escaped."""
    environment = Environment(
        loader=PackageLoader("varscale.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("page.html.jinja").render(report=report)
