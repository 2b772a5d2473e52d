"""How an artifact's tensors lie on disk: two wires, `compressed-tensors` and `regauge`. See `base` and `choose`."""
