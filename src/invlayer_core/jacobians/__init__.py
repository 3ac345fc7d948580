"""First derivatives of the conditions: per-sample blocks, pullback and pushforward."""
