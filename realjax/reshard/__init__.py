"""Parameter reallocation: a tree of arrays moves from the layout of one function call to that of the next."""
