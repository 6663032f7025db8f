"""One module per table, figure or claim, and `results/` with what each of them printed."""
