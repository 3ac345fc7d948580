"""How a solver is run over a batch, and under torch transforms."""
