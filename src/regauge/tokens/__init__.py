"""Which tokens of the residual a block passes by: a score, a schedule and what stands in their place.

All are pure functions of tensors; models are elsewhere. Today they act on models that draw images scale by scale.
"""
