"""The commands of the command line, one a file; heavy libraries are imported when a command runs."""
