"""From scores to a smaller network: plan, cost models, equivalence check, refit."""
