"""FAKE, for tests: stands where cuda-bindings would, see driver.py beside it."""
