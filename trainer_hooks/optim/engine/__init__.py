"""Division of an optimizer step over matrices and ranks; the optimizers beside this package state update rules."""
