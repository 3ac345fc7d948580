"""CasADi expressions evaluated in torch: translation, evaluation, derivatives."""
