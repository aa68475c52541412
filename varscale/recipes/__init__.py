"""Recipes: one YAML file each, its header telling command, expected accuracy, time and hardware."""
