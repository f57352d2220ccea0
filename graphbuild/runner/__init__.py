"""How a stage's tasks are run and recorded, and how far they are."""
