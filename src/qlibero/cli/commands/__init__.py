"""What each subcommand does: call a room, print for people, return the document that becomes the JSON line.

Rooms are imported inside the functions, because `qlibero --help` must answer at once.
"""
