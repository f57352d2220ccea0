"""A store, local or remote: its files read, written and mapped."""
