"""Starting a run in several processes, and joining them."""
