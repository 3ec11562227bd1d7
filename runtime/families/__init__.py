"""The model families: one table, and a folder for each family."""
