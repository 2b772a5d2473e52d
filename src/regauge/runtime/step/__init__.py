"""The native decode step: one call of the kernels runs one token through a whole model."""
