"""The loop of a search around one `Desk`: start, problem, settle, build, finish."""
