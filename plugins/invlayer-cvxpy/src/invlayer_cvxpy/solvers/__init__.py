"""Adapters: each solves one cone program in its library's own Python API."""
