"""What keeps the project's knowledge of tinker's releases fresh; run from the checkout."""
