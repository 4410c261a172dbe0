"""The output folder: shards, journal, card; nothing that loads until all is there."""
