"""Thin doors: each module runs one train script of the host with this add-on active."""
