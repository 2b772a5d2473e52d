"""Stores: what a block keeps of the past, as plain tensors."""
