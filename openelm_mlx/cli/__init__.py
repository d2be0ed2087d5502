"""The command line: one small file a command. Nothing here loads MLX before a command runs."""
