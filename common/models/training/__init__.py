"""A generator of children's stories, and the command that trains `tales` and `tales-draft` on them."""
