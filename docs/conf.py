"""How the documentation is built: `scripts/docs`."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "_ext"))

project = "secateur"
author = "secateur's authors"
release = metadata.version("secateur")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "spellings",
]
exclude_patterns = ["build", "_ext"]
html_theme = "furo"
html_title = f"secateur {release}"
myst_heading_anchors = 3
nb_execution_mode = "cache"  # the notebook runs without a download, once for each change of it
nb_execution_timeout = 600  # seconds for each cell
nb_execution_in_temp = True
nb_output_stderr = "remove"  # warnings of the machine that builds the pages
copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"
copybutton_exclude = ".linenos, .gp, .go"
default_role = "code"  # docstrings put code between single backquotes
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
