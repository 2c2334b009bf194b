"""Asking a new user which answers they prefer, in the terminal or on a local page, and using what they said."""
