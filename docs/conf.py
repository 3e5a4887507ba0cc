"""The site that ``make docs`` builds: the Markdown pages, and a reference from the docstrings."""

import importlib.metadata
import inspect
import re

import pipeline_ext
import pipeline_ext.packing
import pipeline_ext.pipelining

project = "pipeline_ext"
author = "the pipeline_ext authors"
copyright = author
release = importlib.metadata.version("pipeline_ext")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # so that [text](page.md#heading) leads somewhere, and is checked

html_theme = "furo"
html_title = f"pipeline_ext {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]

autodoc_member_order = "bysource"
# The groups in which Pipeline documents its arguments.
napoleon_custom_sections = [
    (group, "params_style")
    for group in (
        "Model and cut",
        "Microbatches",
        "Schedule",
        "Devices and processes",
        "Messages",
        "Numbers",
        "Safety",
    )
]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True

# A reference to a public class of ours must lead somewhere. Types of Python and torch have no page here, and
# nothing is fetched to find one.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!pipeline_ext(\.packing|\.pipelining)?\.[A-Z]\w*$).*")]

# Public names are documented where users import them from, not where they are defined.
for module in (pipeline_ext, pipeline_ext.packing, pipeline_ext.pipelining):
    for public in (getattr(module, name) for name in module.__all__):
        defined = inspect.isclass(public) or inspect.isfunction(public)
        if defined and public.__module__.startswith("pipeline_ext"):
            public.__module__ = module.__name__


def plain_signature(app, what, name, value, options, signature, returned):
    """pybind11 writes ``self`` with its type, and each integer as whatever can be one."""
    if signature:
        signature = re.sub(r"self: [\w.]+(, )?", "", signature)
        signature = signature.replace("typing.SupportsInt | typing.SupportsIndex", "int")
    return signature, returned


def setup(app):
    app.connect("autodoc-process-signature", plain_signature)
