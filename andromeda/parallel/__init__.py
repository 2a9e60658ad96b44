"""Parallel training: a device mesh, and for each of its dimensions a function that takes a built model and gives the parallel one."""
