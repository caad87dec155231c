"""Rows that decode together: one step for all of them, one step ahead."""
