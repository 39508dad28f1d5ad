"""The demo: one real model server, started three ways, and what each start costs.

Run as ``python -m benchmarks.demo``. Owns nothing of the product: it uses the installed commands
and the public client, as an operator and a replica would.
"""
