"""What the pictures of all rooms have in common."""
