"""The documentation as a site, by Sphinx with Debian's packages: `make site`."""

from pathlib import Path

project = "sessiond"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "sessiond"
html_show_copyright = False
html_copy_source = False
# Each heading can be linked to, by the name that GitHub gives it.
myst_heading_anchors = 4

# Debian 12's theme lacks this one, and looks for it elsewhere on the web server.
normalize = Path("/usr/share/javascript/normalize.css/normalize.css")
if normalize.exists():
    html_static_path = [str(normalize)]
    html_css_files = [(normalize.name, {"priority": 100})]  # before the theme's own styles
