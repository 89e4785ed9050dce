"""Where each call of a graph runs: device mesh names, and the plan that gives every call its layout."""
