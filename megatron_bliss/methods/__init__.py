"""What gives sequences (offline) or tokens (online) their weight."""
