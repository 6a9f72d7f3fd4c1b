"""Recipes to copy: what the shim tells, in the backends that people use."""
