"""Batched linear solves with the Jacobian, and the decision on singular ones."""
