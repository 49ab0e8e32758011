"""Access to a model: its adapted layers, its features, and what it is asked and answers."""
