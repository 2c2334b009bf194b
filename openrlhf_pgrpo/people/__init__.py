"""What a model for many users does for people: ask a new user, rank answers for a user, group users."""
