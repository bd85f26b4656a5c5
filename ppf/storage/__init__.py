"""What PPF keeps on disk: files that are whole or not there, sealed, locked, and read against schemas."""
