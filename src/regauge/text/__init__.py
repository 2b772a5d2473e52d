"""Corpora, windows of tokens, what calibrates, and the three texts of a search."""
