"""Options, output and progress that commands share."""
