"""What must be kept: retained rows, their split, the deployed model's answers to them, and what became of these."""
