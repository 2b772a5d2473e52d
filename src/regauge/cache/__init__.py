"""What a block keeps of the past and what it lets go, as data and pure functions: rows of the axes of a cache."""
