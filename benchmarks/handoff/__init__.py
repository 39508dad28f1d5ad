"""What a replica gets and how fast, beside what it would use without us."""
