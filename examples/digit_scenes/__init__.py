"""Digit scenes: a world of pictures and questions small enough for a laptop and hard enough to err in."""
