"""Published measurements, and what the cost model predicts for them."""
