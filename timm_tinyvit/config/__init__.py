"""The flags of all programs, and recipes: YAML files of flags."""
