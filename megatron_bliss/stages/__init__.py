"""One file a stage: joins methods, mcore and data."""
