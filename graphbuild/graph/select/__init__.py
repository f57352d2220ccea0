"""Selections: which rows of a store are used, and the rules that choose them."""
