"""What goes to the Hub: the student's own files by an allow-list, a generated card, and nothing else."""
