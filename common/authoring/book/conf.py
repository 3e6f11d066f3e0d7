"""The configuration of Sphinx for the book. `extension.py` changes the texts.

Why Sphinx, with MyST, myst-nb and Furo: MyST reads Markdown with a CommonMark parser, as GitHub does, so the READMEs
need no second dialect. It resolves their relative links and anchors and reports broken ones. myst-nb shows a notebook's
saved outputs. Furo has a light and a dark theme and needs no network, and Sphinx's search also works on pages that are
opened from a disk. All are maintained, and run on every Python that the course supports. (MkDocs reads Python-Markdown,
to which the READMEs' folded answers are one block of HTML.)
"""

from common.authoring.book.extension import pages

project = "The same tokens, sooner"
html_title = project
root_doc = "README"
extensions = ["myst_nb", "common.authoring.book.extension"]

include_patterns = pages()
exclude_patterns = [".*"]  # .venv and .git need not be searched

# Markdown as GitHub reads it: its extensions, its anchors, and nothing that only MyST knows.
myst_enable_extensions = ["dollarmath", "strikethrough", "tasklist"]
myst_dmath_allow_space = False
myst_dmath_allow_digits = False
myst_dmath_double_inline = True
myst_disable_syntax = ["myst_line_comment", "myst_block_break", "myst_role", "myst_target"]
myst_fence_as_directive = ["math", "mermaid"]
myst_heading_anchors = 6
suppress_warnings = ["myst.strikethrough"]  # "only supported in HTML", which is all that is made here

smartquotes = False
highlight_language = "none"  # of a block that does not name one

nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "How it is drawn", "How it is drawn"

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_copy_source = False
html_use_index = False
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "svg"
pygments_style = "default"
pygments_dark_style = "github-dark"
