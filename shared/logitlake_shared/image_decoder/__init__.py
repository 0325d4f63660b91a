"""Decoding one image, and the program of a process that does nothing else.

Apart from `logitlake_shared.images`, which uses it, because a decoder process must be small: it is started often,
lives under a memory cap, and imports PIL and the standard library alone.
"""
