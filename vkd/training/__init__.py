"""Training: the loop, its precision, its checkpoints, the teacher, and what is measured."""
