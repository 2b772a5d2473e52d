"""Corpora and windows of tokens."""
