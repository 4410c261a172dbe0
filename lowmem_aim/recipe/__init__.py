"""What a recipe says: mergekit's YAML and the command line, read and checked."""
