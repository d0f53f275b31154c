"""What surrounds a launch: checks of arguments, shapes, tiles, plans, and the files kept for a user."""
