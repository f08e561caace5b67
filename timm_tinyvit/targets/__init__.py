"""What is kept of a teacher's output: sparse targets, their loss, their codecs. Knows torch and numpy alone."""
