"""Several tokens for one reading of the weights: guesses of what comes next, and how many of them to try."""
