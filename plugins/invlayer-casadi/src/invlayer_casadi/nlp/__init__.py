"""CasADi's NLP and QP solvers as layers: the problem, its conditions, its sparse factors."""
