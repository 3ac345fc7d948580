"""One program, one per-sample solver: the stations of the spine in NumPy, without what batches need.

For small programs the general stations cost far more than the solver does, and for sparse ones as much. Here
are the same stations (solve, certify, polish, attach) for what is common and plain: one program in float64 on
the CPU, dense or sparse, and no torch transform. Whatever is not plain (a solver that fails, an active set
that is not proved in a few steps, a singular system, a second derivative) is left to the general way, which
decides.

It is imported on first use: NumPy is at hand there, as a per-sample solver has been given its arrays.
"""
