"""Derived lists: near-duplicates, negatives, positives, and what all lists share."""
