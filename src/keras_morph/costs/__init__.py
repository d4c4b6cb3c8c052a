"""What a network costs, and what it may cost."""
