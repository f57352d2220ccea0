"""What this machine has: threads, GPUs, versions of packages, compiled loops, a terminal."""
