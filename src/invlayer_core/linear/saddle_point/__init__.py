"""Saddle-point systems of quadratic programs: dense batches, sparse samples, and what singular ones give."""
