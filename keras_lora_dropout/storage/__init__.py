"""Files: how adapters are stored."""
