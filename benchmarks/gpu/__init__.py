"""What the product does on a real GPU. Owns its processes; uses what replicas and operators have."""
