"""Modules that keep their weights packed in memory. See `modules` (what stands in a model) and `multiply` (how)."""
