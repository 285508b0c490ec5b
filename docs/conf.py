"""Sphinx settings of the site that ``make docs`` builds."""

import re
from typing import Any

from sb3_dreamer_gpld import __version__

project = "sb3-dreamer-gpld"
copyright = "the sb3-dreamer-gpld contributors"
release = version = __version__

exclude_patterns = ["data"]  # figures of benchmarks, no pages
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
# $…$ and $$…$$ are formulas, and headings can be linked to as on GitHub.
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"{project} {version}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}


def split_names(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Give each name of ``:param a, b: …`` and ``:raises A, B: …`` an entry of its own, and keep the stars of shapes from
    being read as emphasis."""
    result = []
    for line in lines:
        found = re.match(r":(param|raises) (\w+(?:, \w+)+):(.*)", line)
        entries = [line]
        if found:
            field, (first, *others), text = found[1], found[2].split(", "), found[3]
            entries = [f":{field} {first}:{text}", *(f":{field} {other}: likewise" for other in others)]
        result += [re.sub(r"(?<![\w`*])\*(?=\w)", r"\\*", entry) for entry in entries]
    lines[:] = result


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", split_names)
