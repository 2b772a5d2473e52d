"""What runs: packed products, the decode step, caches, a window on a larger model. No model library in here."""
