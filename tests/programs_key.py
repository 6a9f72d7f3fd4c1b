"""The key that every test uses; it must not turn up anywhere."""

CANARY = "tml-canary-5f2c9e7d41"
