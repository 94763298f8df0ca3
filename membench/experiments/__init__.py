"""The papers' experiments, each a function from cells to rows, a figure and what it shows."""
