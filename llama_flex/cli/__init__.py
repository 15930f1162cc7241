"""The command line: arguments, prompt files, sessions, chat, output and statistics."""
