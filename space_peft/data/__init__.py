"""What users give, without a model: names, questions, rows and pictures."""
