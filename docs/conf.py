"""How the documentation is built: `scripts/docs`."""

from importlib import metadata

project = "secateur"
author = "secateur's authors"
release = metadata.version("secateur")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["build"]
html_theme = "furo"
html_title = f"secateur {release}"
myst_heading_anchors = 3
nb_execution_mode = "off"  # a test runs the notebook
default_role = "code"  # docstrings put code between single backquotes
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
