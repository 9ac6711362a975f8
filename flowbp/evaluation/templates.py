"""flowbp/templates: of pages, of the terminal's tables, and of what is said in words. Filters are functions under their
own names: those of `numbers`, and what modules add that have more to say.
"""

from functools import cache
from typing import Any

import jinja2

from flowbp.evaluation.numbers import FILTERS, METRICS, NOT_BETTER
from flowbp.names import IMAGE_STATISTICS
from flowbp.runtime.console import plain


@cache
def templates() -> jinja2.Environment:
    escaped, loader = jinja2.select_autoescape(), jinja2.PackageLoader("flowbp")
    made = jinja2.Environment(loader=loader, autoescape=escaped, trim_blocks=True, undefined=jinja2.StrictUndefined)
    made.filters |= {function.__name__: function for function in FILTERS}
    made.globals |= {"not_better": NOT_BETTER, "image_statistics": IMAGE_STATISTICS, "about": METRICS, "words": words}
    return made


def render(template: str, **values: Any) -> str:
    """A page of flowbp/templates, as HTML."""
    return plain(templates().get_template(template).render(**values))


def words(macro: str, **values: Any) -> list[str]:
    """The lines that a macro of words.jinja says."""
    said = getattr(templates().get_template("words.jinja").module, macro)(**values)
    return [line for line in said.split("\n") if line]
