"""Quadratic programs: what a call is given, its active set certified, one small program by a short way."""
