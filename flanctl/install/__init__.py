"""Putting flanctl in its place on a host, and taking it away again."""
