"""The student's half: everything that train_distill.py is made of."""
