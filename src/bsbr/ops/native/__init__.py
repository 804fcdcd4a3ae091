"""The attention of the CPU in C, compiled on the user's machine when it is first wanted; optional."""
