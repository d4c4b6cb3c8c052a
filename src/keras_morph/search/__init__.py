"""Which structure meets a budget."""
