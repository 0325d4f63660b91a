"""Worlds to try LogitLake in; each folder has its own README."""
