"""How an optimizer step is divided over matrices and ranks; the optimizers beside this package state update rules."""
