"""Forms of attention, beside the whole causal one: which blocks take their probabilities from an earlier block, and
what each head sees. Pure data, masks and numbers; models that attend so are the host's."""
