"""Methods side by side on one model and text: which rows, their results kept, each against its null, and a ranking."""
