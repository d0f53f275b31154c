"""What surrounds a launch: checks of arguments, shapes, tiles, and the files that are kept for a user."""
