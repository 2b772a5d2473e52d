"""The native decode step: `plug.plug` puts it under a transformers model, `stream.stream` is the thin loop over it."""
