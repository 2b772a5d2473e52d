"""The search over members of a family: which part of a model is the best within a budget, measured."""
