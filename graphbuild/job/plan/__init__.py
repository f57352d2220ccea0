"""What a job will take before it runs: `graphbuild plan`, and `--dry-run` of the verbs that build (show.py)."""
