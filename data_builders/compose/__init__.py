"""Question families and their wording."""
