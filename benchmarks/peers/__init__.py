"""Our verified, durable download beside those of others: ``python -m benchmarks.peers``.

One run on one machine: nginx on loopback gives the same files to every contestant in turn, round after round,
and what the machine itself allows is measured in the same rounds. Uses of the product what its users have:
the installed daemon, the public client, the operators' socket.
"""
