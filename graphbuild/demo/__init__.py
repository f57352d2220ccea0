"""The demo: captioned scenes drawn on the spot, a small faulty web that serves them, and the data job."""
