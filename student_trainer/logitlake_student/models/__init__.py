"""Building students: assembled from parts, upcycled to experts, their routers overheard."""
