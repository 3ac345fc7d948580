"""What the output of a solver satisfies: one small module per problem kind."""
