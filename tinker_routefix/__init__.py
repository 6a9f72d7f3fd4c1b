"""Survive stale gateway routes in tinker training runs."""
