"""Pruning: what is taken out, which of it matters, how much goes from where, in how many steps, and the repair.

One part an axis; see `base.py` for the contracts.
"""
