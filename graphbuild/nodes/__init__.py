"""Samples and their distinct texts: scanned, numbered, and turned into vectors."""
