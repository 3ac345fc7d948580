"""CasADi's root finders: on any conditions, and as they are."""
