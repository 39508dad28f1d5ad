"""The public face of the client; filled lazily so that importing it stays light."""
