"""Finished runs: their `results.json` files, and the rows of tables that are made of them."""
