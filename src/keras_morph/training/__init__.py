"""Learning, while a model trains, which channels it needs."""
