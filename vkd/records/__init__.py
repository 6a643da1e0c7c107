"""What runs leave behind: reading it, the statistics over seeds, and the tables and plots made of it.

Nothing here imports torch: records are files, and reading them starts fast on any machine.
"""
