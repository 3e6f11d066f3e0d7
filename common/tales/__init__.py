"""`tales` and `tales-draft`: a generator of children's stories, and the command that trains two small models on them."""
