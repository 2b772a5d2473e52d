"""What a cache keeps: which tokens matter, how many each head keeps, what becomes of the others, what layers share.

One part an axis; see `base.py` for the contracts. All are pure functions of tensors; stores and models are elsewhere.
"""
