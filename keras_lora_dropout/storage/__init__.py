"""Files: what an adapter looks like on disk."""
