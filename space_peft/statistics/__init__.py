"""What a few values say of the rest, and how strong an adapter may be for a risk that its user names."""
