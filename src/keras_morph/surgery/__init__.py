"""The smaller model of a structure."""
