"""Standby processes that hold model weights in memory; one per device. Decides nothing."""
