"""A few questions with known answers, stored with an adapter."""
