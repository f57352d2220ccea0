"""A whole job: its steps in their order, what it will take, what is tried again, what its end says."""
