"""What every part of secateur needs from the machine: processes, files, memory, progress."""
