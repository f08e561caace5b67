"""The teacher's half: run the teacher once on every view, fill stores, and copy, check and estimate them."""
